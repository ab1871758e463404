"""A run that an earlier release began resumes with the same numbers.

older_run/ was killed in step 5 of 8 and holds the checkpoint of step 3; expected.safetensors is the
model that the release which wrote it exports after it resumes (dpo-orchestrator 0.1.0, checkpoints
of format 4). settings.json is the file of that run, begun in /tmp/dpo.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.command_line import orchestrator
from support.run_files import losses

OLDER_RUN = Path(__file__).parent / "older_run"
WRITER = ("2.13.0+cpu", "553aa95c87e45f04")
"""torch and CPU that wrote expected.safetensors; others round in another way."""


def cpu() -> str:
    """Return a digest of what determines the kernels of torch and MKL on this machine."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    lines = {line for line in info if line.startswith(("vendor_id", "model name", "flags"))}
    kernels = torch.backends.cpu.get_cpu_capability()
    return sha256("\n".join([kernels, *sorted(lines)]).encode()).hexdigest()[:16]


def test_resumes_a_run_of_an_earlier_release(tmp_path: Path) -> None:
    shutil.copytree(OLDER_RUN, tmp_path, dirs_exist_ok=True)
    run_dir = tmp_path / "killed" / "tiny"
    shutil.move(tmp_path / "run", run_dir)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("/tmp/dpo", str(tmp_path)))
    settings = json.loads((tmp_path / "settings.json").read_text()) | {"callbacks": []}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))

    resumed = orchestrator("debug", "run.yaml", cwd=tmp_path)

    assert resumed.returncode == 0, resumed.stderr
    assert "after step 3" in resumed.stdout
    assert sorted(losses(run_dir)) == list(range(1, 9))
    expected = load_file(tmp_path / "expected.safetensors")
    weights = load_file(run_dir / "model" / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    if (torch.__version__, cpu()) == WRITER:
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
