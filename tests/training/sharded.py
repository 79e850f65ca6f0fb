"""One of several processes: does a model that is sharded as accelerate does it get the gradient of the whole batch?

Run by test_training: python -m torch.distributed.run ... tests/training/sharded.py MODEL
"""

import sys
import types

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl.trainer.utils import add_fused_lm_head

from ssd import models
from ssd.training.sft import gather_head


def loaded(folder: str) -> torch.nn.Module:
    model = models.load_weights(folder, torch.float32)
    model.base_model.visual.requires_grad_(False)
    add_fused_lm_head(model)
    return model


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(model._no_split_modules),
    )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    on_cpu = types.SimpleNamespace(  # accelerate itself shards on accelerators alone
        state=types.SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"), mixed_precision="no",
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=["all"]), is_main_process=dist.get_rank() == 0,
        torch_device_mesh={("all",): init_device_mesh("cpu", (dist.get_world_size(),))},
    )  # fmt: skip
    return fsdp_utils.fsdp2_prepare_model(on_cpu, model)


def add_gradient(model: torch.nn.Module, ids_BT: torch.Tensor, weight: float) -> None:
    gather_head(model)
    labels = {"labels": ids_BT, "num_items_in_batch": ids_BT[:, 1:].numel()}
    (weight * model(input_ids=ids_BT, fused_lm_head=True, **labels).loss).backward()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    ids_BT = torch.randint(3, 60, (2 * size, 24), generator=torch.Generator().manual_seed(0))
    alone, together = loaded(sys.argv[1]), sharded(loaded(sys.argv[1]))
    add_gradient(alone, ids_BT, 1.0)
    for row in range(2 * rank, 2 * rank + 2):
        add_gradient(together, ids_BT[row : row + 1], 1 / len(ids_BT) * size)  # FSDP takes the mean over processes
    for (name, one), other in zip(alone.named_parameters(), together.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=name)
    dist.destroy_process_group()
