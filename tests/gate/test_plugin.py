"""The pytest plugin, in sessions of its own: the fixture, its messages, and what it leaves alone."""

import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable

import pytest
from test_package import ROOT

pytest_plugins = ["pytester"]

PLUGIN = "stabilitykit.gate.pytest_plugin"

MODELS = """
    import pytest
    import torch
    from torch import nn

    class Sum(nn.Module):
        '''x + x, then a head: 40,000 twice is past the maximum of float16.'''

        def __init__(self, absorbs=False):
            super().__init__()
            self.head = nn.Linear(4, 8, bias=False)
            self.absorbs = absorbs

        def forward(self, x, scale=1.0):
            twice = (x + x) * scale
            return self.head(1 / twice if self.absorbs else twice)

    torch.manual_seed(0)
    LARGE = {"x": torch.full((2, 4), 40000.0)}
    SMALL = (torch.full((2, 4), 4.0),)
"""

Session = Callable[[str], pytest.RunResult]


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Runs a test file with the plugin, as if it were the only one that is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(tests: str) -> pytest.RunResult:
        pytester.makepyfile(textwrap.dedent(MODELS) + textwrap.dedent(tests))
        return pytester.runpytest_inprocess("-p", PLUGIN, "-p", "no:cacheprovider")

    return run


def test_the_package_brings_the_plugin_and_pytest_loads_no_torch_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"stabilitykit": PLUGIN}
    code = f"import sys, {PLUGIN}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_assertions_hold_and_fail_with_the_verdict(session: Session) -> None:
    done = session(
        """
        def test_small(stability):
            recording = stability.assert_finite(Sum(), SMALL, dtype="float16")
            assert recording.header.dtype == "float16"

        def test_in_its_own_dtype(stability):
            stability.assert_finite(Sum(), LARGE)
            stability.assert_finite(Sum().half(), (torch.ones(1, 4, dtype=torch.float16),))

        def test_large(stability):
            stability.assert_finite(Sum(), LARGE, dtype=torch.float16)

        def test_absorbed(stability):
            stability.assert_finite(Sum(absorbs=True), LARGE, dtype="float16")
        """
    )
    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines(
        [
            "E*AssertionError: float16 overflows in*40,000 + 40,000 = 80,000 exceeds the float16 maximum, 65,504.*",
            "E*AssertionError: float16 overflows in*It is absorbed in*",
        ]
    )
    done.stdout.no_fnmatch_line("*assertions.py*")  # the test's own line is what is shown


def test_headroom(session: Session) -> None:
    done = session(
        """
        def test_enough(stability):
            stability.assert_headroom(Sum(), SMALL, bits=10, dtype="float16")

        def test_too_little(stability):
            stability.assert_headroom(Sum(), (torch.full((1, 4), 20000.0),), bits=1, dtype="float16")

        def test_none(stability):
            stability.assert_headroom(Sum(), LARGE, dtype="float16")
        """
    )
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(
        [
            "E*AssertionError: float16 has 0.26 bits of headroom in head, operator matmul, and 1 are asked for:*",
            "E*AssertionError: float16 overflows in*",
        ]
    )


def test_closeness_to_float32(session: Session) -> None:
    done = session(
        """
        def test_close(stability):
            distance = stability.assert_close_to_float32(Sum(), SMALL, kl=1e-3, dtype="float16")
            assert distance.rows == 2
            assert 0 <= distance.kl_mean < 1e-3

        def test_far(stability):
            stability.assert_close_to_float32(Sum(), (torch.randn(64, 4) * 20,), kl=1e-6, dtype="bfloat16")

        def test_error(stability):
            stability.assert_close_to_float32(Sum(), SMALL, kl=None, error=1e-9, dtype="float16")

        def test_lost(stability):
            stability.assert_close_to_float32(Sum(), LARGE, dtype="float16")
        """
    )
    done.assert_outcomes(passed=1, failed=3)
    done.stdout.fnmatch_lines(
        [
            "E*bfloat16 is far from float32: the mean KL divergence is * nats a row over 64 rows*1e-06 is the limit.*",
            "E*float16 is far from float32: the largest difference is *1e-09 is the limit.*",
            "E*float16 overflows in*40,000 + 40,000 = 80,000*",
        ]
    )


def test_the_divergence_is_that_of_float64(session: Session) -> None:
    done = session(
        """
        def test_it(stability):
            model, x = Sum().requires_grad_(False), torch.randn(16, 4) * 3
            found = stability.assert_close_to_float32(model, (x,), kl=1.0, dtype="bfloat16")
            import copy
            low = copy.deepcopy(model).bfloat16()
            p = model(x).double().log_softmax(-1)
            q = low(x.bfloat16()).double().log_softmax(-1)
            assert found.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        """
    )
    done.assert_outcomes(passed=1)


def test_nothing_of_the_users_changes(session: Session) -> None:
    done = session(
        """
        def test_it(stability):
            model = Sum()
            before = {name: one.clone() for name, one in model.state_dict().items()}
            inputs = {"x": torch.full((2, 4), 4.0)}
            state = torch.get_rng_state()
            stability.assert_finite(model, inputs, dtype="float16")
            stability.assert_close_to_float32(model, inputs, dtype="float16")
            assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
            assert next(model.parameters()).dtype == torch.float32
            assert next(model.parameters()).requires_grad
            assert not model._forward_hooks and not model.head._forward_hooks
            assert torch.equal(inputs["x"], torch.full((2, 4), 4.0))
            assert torch.equal(state, torch.get_rng_state())
        """
    )
    done.assert_outcomes(passed=1)


def test_misuse_is_an_error_of_its_own(session: Session) -> None:
    done = session(
        """
        from stabilitykit.errors import MisuseError

        def test_it(stability):
            for call in (
                lambda: stability.assert_finite(Sum(), torch.ones(2, 4)),
                lambda: stability.assert_finite(lambda x: x, SMALL),
                lambda: stability.assert_finite(Sum(), SMALL, dtype="float3"),
                lambda: stability.assert_close_to_float32(Sum(), (torch.full((1, 4), float("inf")),)),
            ):
                with pytest.raises(MisuseError):
                    call()
        """
    )
    done.assert_outcomes(passed=1)


def test_a_session_that_does_not_use_it_imports_no_torch(pytester: pytest.Pytester, session: Session) -> None:
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    pytester.runpytest_subprocess("-p", PLUGIN, "-p", "no:cacheprovider").assert_outcomes(passed=1)
