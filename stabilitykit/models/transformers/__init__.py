"""Models as transformers builds them, from a folder on disk (extra: hf)."""

from stabilitykit.models.transformers.load import (
    continues_text as continues_text,
)
from stabilitykit.models.transformers.load import (
    open_model as open_model,
)
from stabilitykit.models.transformers.load import (
    stored_bytes as stored_bytes,
)
from stabilitykit.models.transformers.load import (
    stored_tensors as stored_tensors,
)
from stabilitykit.models.transformers.model import (
    HuggingFaceModel as HuggingFaceModel,
)
from stabilitykit.models.transformers.tokenizer import (
    HuggingFaceTokenizer as HuggingFaceTokenizer,
)
from stabilitykit.models.transformers.tokenizer import (
    open_tokenizer as open_tokenizer,
)
