"""Program of each process of test_distributed.py under torchrun: `rank_program.py STORE OUT` writes OUT/rank<N>.pt."""

import functools
import sys
from pathlib import Path

import torch
from torch import nn

from fastresnet.config import TrainConfig
from fastresnet.distributed import World, connected
from fastresnet.evaluation import evaluate, open_evaluation
from fastresnet.models.batchnorm import synchronize_batch_norms
from fastresnet.models.resnet import create_resnet
from fastresnet.models.stochastic_depth import seed_stochastic_depth
from fastresnet.training.mixing import Mixer
from fastresnet.training.optimizer import create_optimizers
from fastresnet.training.step import TrainStep
from pipelines import Augmentation, open_pipeline
from pipelines.store import Dataset, open_store

CPU = torch.device("cpu")
BATCH_SIZE, EPOCHS = 24, 2
AUGMENTATION = Augmentation(flip="alternating", cutout=8)


def samples(dataset: Dataset, pipeline: str, world: World) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the pixels and labels of two epochs on this rank, batch by batch."""
    opened = open_pipeline(
        pipeline, dataset, train=True, batch_size=BATCH_SIZE, device=CPU, dtype=torch.uint8, seed=3,
        augmentation=AUGMENTATION, rank=world.rank, world_size=world.world_size,
    )  # fmt: skip
    batches = [
        (batch.images.clone(), batch.labels.clone()) for epoch in range(EPOCHS) for batch in opened.epoch(epoch, 4)
    ]
    opened.close()
    return batches


def network(drop_path: float = 0.0) -> nn.Module:
    """Create ResNet-8, which has one block in each stage."""
    torch.manual_seed(0)
    model = create_resnet(8, num_classes=10, shortcut="B", drop_path=drop_path)
    return model.to(memory_format=torch.channels_last)


@functools.cache
def train(dtype: torch.dtype, world: World, *, batch_size: int, mix: bool, lr: float = 1e-3) -> dict[str, torch.Tensor]:
    """Weights and statistics after four steps with everything that depends on the place of an image in its batch."""
    model = network(drop_path=0.3).to(dtype)
    if not world.is_single:
        synchronize_batch_norms(model)
    rows = world.rows(batch_size)
    mixer = Mixer(mixup=0.5, cutmix=1.0, seed=5, device=CPU) if mix else None
    step = TrainStep(
        model, create_optimizers(model, TrainConfig(lr=1.0)), [lr] * 4, precision="fp32", device=CPU, clip_norm=1.0,
        ema_decay=0.9, mixer=mixer, world=world, batch_size=batch_size,
    )  # fmt: skip
    seed_stochastic_depth(model, 7, step.count, step.row)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(dtype)
        labels = torch.randint(0, 10, (batch_size,), generator=generator)
        step(images[rows].contiguous(memory_format=torch.channels_last), labels[rows])
    return {**model.state_dict(), **{f"averaged.{k}": v for k, v in step.averaged.state_dict().items()}}


def evaluation(dataset: Dataset, world: World) -> dict[str, object]:
    """Accuracy and loss of a network with random weights on a test set that the ranks cannot share evenly."""
    pipeline = open_evaluation(dataset, "half", "fp32", CPU, world=world)
    result = evaluate(network(), pipeline, dataset.classes, precision="fp32", device=CPU, tta="shift", world=world)
    figures = ("accuracy", "loss", "per_class", "mirror_accuracy", "shift_accuracy")
    return {"confusion": result.confusion.tolist(), **{name: getattr(result, name) for name in figures}}


def main() -> None:
    store, out, *pipelines = sys.argv[1:]
    dataset = open_store(Path(store))
    with connected(CPU) as world:
        results = {
            "samples": {name: samples(dataset, name, world) for name in pipelines},
            "mixed": train(torch.float64, world, batch_size=16, mix=True),
            "uneven": train(torch.float64, world, batch_size=15, mix=False),
            "single": train(torch.float32, world, batch_size=16, mix=True, lr=1e-4),
            "evaluation": evaluation(dataset, world),
            "highest": world.highest(world.rank * 7, CPU),
        }
        torch.save(results, Path(out) / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main()
