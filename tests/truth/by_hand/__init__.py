"""Changes to a planted fault, each made by hand in plain torch and transformers: what a diagnosis is held to.

A change is given a fault that was built anew, changes it, and returns what takes the model's place in the fault's run;
None where there is nothing that it could change. Whatever has to be undone goes on the stack.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from truth.row import Planted

Change = Callable[[Planted, ExitStack], Any]
