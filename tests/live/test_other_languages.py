"""The published layout is that of safetensors: others than Python and this project read it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from src.live.weights import Publisher
from src.networks import CNN


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node here")
def test_a_reader_in_node_gets_the_same_numbers(tmp_path: Path) -> None:
    network = CNN(norm="batch")
    publisher = Publisher(tmp_path / "live", {})
    publisher.publish(network.state_dict(), 7, 0)
    publisher.wait()
    reader = Path(__file__).with_name("reader.mjs")
    done = subprocess.run(["node", reader, tmp_path], capture_output=True, text=True, timeout=60, check=False)
    publisher.close()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"] == 7
    sums = {name: float(tensor.double().sum()) for name, tensor in network.state_dict().items()}
    assert found["sums"] == pytest.approx(sums, rel=1e-9, abs=1e-9)


def test_the_library_of_that_name_reads_it_too(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network = CNN(norm="batch")
    publisher = Publisher(tmp_path / "live", {})
    publisher.publish(network.state_dict(), 7, 0)
    publisher.wait()
    found = safetensors.load_file(publisher.segment / "weights.safetensors")
    publisher.close()
    for name, tensor in network.state_dict().items():
        assert torch.equal(found[name], tensor)
