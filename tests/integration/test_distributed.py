"""DDP over two gloo processes: the head is fused within its bucket, and gradients are those of the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.compiling import Rewritten

WORLD, CLASSES = 2, 50


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 256)
        self.body = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 256))
        self.head = nn.Linear(256, CLASSES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.body(self.embedding(ids[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def data() -> Tensor:
    return torch.randint(0, CLASSES, (2 * WORLD, 9), generator=torch.Generator().manual_seed(1))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    # Buckets this small cut the model in several graphs, as a large model's would be.
    model: Any = nn.parallel.DistributedDataParallel(make_model(), bucket_cap_mb=1)
    fast = Rewritten(model, then="aot_eager")
    fast(data()[2 * rank : 2 * rank + 2]).backward()
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        save_file(gradients, f"{folder}/gradients.safetensors", {"statuses": ",".join(fast.statuses)})
        Path(folder, "statuses").write_text(f"{','.join(fast.statuses)} in {len(fast.graphs)}", encoding="utf-8")
    dist.destroy_process_group()


def test_a_dtensor_head_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, target = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 5])
        weight = nn.Parameter(distribute_tensor(torch.randn(10, 8), mesh, [Shard(0)]))
        operands = (distribute_tensor(x, mesh, [Replicate()]), weight, distribute_tensor(target, mesh, [Replicate()]))

        def step(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight), target)

        fast = Rewritten(step, then="aot_eager")
        loss = fast(*operands)
        assert torch.equal(loss.full_tensor(), step(*operands).full_tensor())  # type: ignore[attr-defined]
        assert fast.statuses == ["missed"]
        assert "is a DTensor" in fast.sites[0].reason
    finally:
        dist.destroy_process_group()


def test_gradients_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    statuses, _, graphs = (tmp_path / "statuses").read_text(encoding="utf-8").partition(" in ")
    assert statuses == "rewritten"
    assert int(graphs) > 1, "one bucket only: the graph was not split"
    model = make_model()
    model(data()).backward()
    gradients = load_file(tmp_path / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
