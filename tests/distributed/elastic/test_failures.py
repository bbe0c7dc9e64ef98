"""What is taken for another process's death, and what is not."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from clantune_scale.distributed.elastic.failures import one_line, peer_failure
from clantune_scale.errors import TopologyError, TransferError

# As gloo of torch 2.13 says it; in this order: a peer was killed, stopped, used after that, absent at the start.
GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:35020. This is typically caused by a remote worker crashing.",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation "
    "to complete",
    "Application timeout caused pair closure",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
)


@pytest.mark.parametrize("text", GLOO)
def test_gloos_errors_are(text):
    error = RuntimeError(text)
    assert peer_failure(error) is error


@pytest.mark.parametrize("kind", [dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError])
def test_torchs_own_are(kind):
    error = kind("NCCL communicator was aborted on rank 0")
    assert peer_failure(error) is error


def _wrapped() -> BaseException:
    try:
        try:
            raise RuntimeError(GLOO[0])
        except RuntimeError as error:
            raise ValueError("training failed") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x16 and 24x8)"),
        RuntimeError("my gloo transport timed out"),
        ConnectionResetError("Connection reset by peer"),
        TimeoutError("timed out"),
        TopologyError(GLOO[0]),
        ValueError(GLOO[0]),
        KeyboardInterrupt(),
        _wrapped(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_users_are_not(error):
    assert peer_failure(error) is None


def test_a_failed_transfer_is():
    error = TransferError("member 1 (rank 1) did not get member 0's state in two attempts")
    assert peer_failure(error) is error


def test_one_line_is_told():
    assert one_line(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert len(one_line(RuntimeError("x" * 999))) == 300
