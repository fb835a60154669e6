"""NVIDIA DALI: its operators decode, crop, flip, cut out and normalise, in our order and with our parameters.

They run on a GPU if there is one (`device="gpu"`, JPEG with nvJPEG), else on the CPU. The epoch's plan is an external
source: DALI's readers, with their own order and epochs, are not used.
"""

from __future__ import annotations

import platform
import sys
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .augment import Normalization, fill_color
from .base import Batch, Pipeline
from .errors import UsageError
from .formats import open_derived, open_shard
from .sampling import IMAGE_SIZE, Draws, EpochPlan

try:
    from nvidia.dali import Pipeline as DaliGraph
    from nvidia.dali import fn, types
    from nvidia.dali.data_node import DataNode
except (ImportError, OSError) as error:  # a missing shared library raises OSError
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UsageError(
            f"DALI does not run on {platform.system()} {platform.machine()}, only on Linux on x86_64 and aarch64; on "
            "Windows, use WSL. Choose another --pipeline."
        ) from None
    raise UsageError(
        f"DALI is not installed ({error}): pip install 'fastresnet[dali]', or 'fastresnet[dali-cu13]' with a driver "
        "for CUDA 13"
    ) from None

_AHEAD = 2
"""Number of batches that DALI prefetches."""


class DaliPipeline(Pipeline):
    """Pipeline that reads the store's raw pixels or its JPEG shard, and executes the plan with DALI's operators."""

    def _open(self) -> None:
        augmentation = self._augmentation
        self._images = np.asarray(self._split.images)
        self._shard = None
        if self._decode == "jpeg":
            self._shard = open_shard(*open_derived(self._dataset, "jpeg", self._split.name))
        uses = {"start": augmentation.crop_padding, "flip": augmentation.flip != "none", "cutout": augmentation.cutout}
        self._inputs = ["images", *(name for name, used in uses.items() if used)]
        self._feeds: Iterator[tuple] = iter(())
        self._in_use: deque[tuple] = deque()
        self._graph = self._build()

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        self._drain()
        self._feeds = (self._feed(plan.rows[step], plan.draws.of(step)) for step in range(start, len(self)))
        all_labels = torch.from_numpy(plan.labels)
        self._graph.reset()
        self._graph.schedule_run()  # fills the queue
        for step in range(start, len(self)):
            images = self._take()
            self._graph.schedule_run()
            labels = all_labels[step].to(self._device, non_blocking=True)
            yield Batch(images, labels, self.valid(step))

    def _take(self) -> Tensor:
        """Take the next finished batch, with a copy only for a 16-bit type."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (output,) = self._graph.share_outputs(stream)
        images = torch.from_dlpack(output.as_tensor())
        self._graph.release_outputs()
        self._in_use.popleft()
        return images.to(self._dtype).permute(0, 3, 1, 2)

    def _drain(self) -> None:
        """Run DALI to the end of an abandoned epoch, so that it can be reset."""
        self._feeds = iter(())
        self._graph.schedule_run()
        while not self._graph.empty():
            self._graph.share_outputs()
            self._graph.release_outputs()
        self._in_use.clear()

    # --- inputs --------------------------------------------------------------------------------------------------

    def _feed(self, rows: np.ndarray, draws: Draws) -> tuple:
        """Collect the inputs of a batch, in the order of `self._inputs`."""
        side, padding = self._augmentation.cutout, self._augmentation.crop_padding
        # Reflected images are padded by the graph, which moves the origin; zeros are added by the slice itself.
        origin = padding if self._augmentation.padding_mode == "zeros" else 0
        left = np.where(draws.flip == 1, IMAGE_SIZE - side - draws.cutout_left, draws.cutout_left)
        every = {
            "images": self._images[rows] if self._shard is None else [self._shard.encoded(row) for row in rows],
            "start": np.stack([draws.top - origin, draws.left - origin], axis=1).astype(np.int32),
            "flip": draws.flip.astype(np.int32),
            "cutout": np.stack([draws.cutout_top, left], axis=1).astype(np.float32),
        }
        return tuple(every[name] for name in self._inputs)

    def _next(self) -> tuple:
        """Return the inputs of DALI's next batch; `StopIteration` ends its epoch."""
        inputs = next(self._feeds)
        self._in_use.append(inputs)  # DALI reads these arrays in place until the batch is finished
        return inputs

    # --- operators -----------------------------------------------------------------------------------------------

    def _build(self) -> DaliGraph:
        on_gpu = self._device.type == "cuda"
        graph = DaliGraph(
            batch_size=self._sampler.rows_per_batch,
            num_threads=torch.get_num_threads(),
            device_id=_gpu_number(self._device) if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
            exec_dynamic=True,  # outputs own their memory, and stay valid during later batches
        )
        with graph:
            layouts = ["" if self._shard or name != "images" else "HWC" for name in self._inputs]
            sources = fn.external_source(
                source=self._next, num_outputs=len(layouts), batch=True, no_copy=True, layout=layouts
            )
            inputs = dict(zip(self._inputs, sources, strict=True))
            images = inputs["images"]
            if self._shard:
                images = fn.decoders.image(images, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            elif on_gpu:
                images = images.gpu()
            if "start" in inputs:
                images = self._crop(images, inputs["start"])
            if side := self._augmentation.cutout:
                images = fn.erase(
                    images,
                    anchor=inputs["cutout"],
                    shape=[side, side],
                    axis_names="HW",
                    fill_value=fill_color(self._dataset).tolist(),
                )
            graph.set_outputs(self._flip_and_normalize(images, inputs.get("flip", 0)))
        graph.build()
        return graph

    def _crop(self, images: DataNode, start: DataNode) -> DataNode:
        if self._augmentation.padding_mode == "reflect":
            images = _reflect_pad(images, self._augmentation.crop_padding)
        return fn.slice(
            images, start=start, shape=[IMAGE_SIZE, IMAGE_SIZE], axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
        )

    def _flip_and_normalize(self, images: DataNode, flip: DataNode | int) -> DataNode:
        if self._dtype == torch.uint8:
            return fn.flip(images, horizontal=flip)
        # Always in float32, then cast by torch: DALI has no bf16, and on a GPU it computes fp16 outputs in fp16, which
        # on an H200 were off by a tenth of a grey level.
        normalization = Normalization.of(self._augmentation.normalization, self._dataset)
        if self._augmentation.normalization == "pixel":
            device = "gpu" if self._device.type == "cuda" else "cpu"
            mean = types.Constant(normalization.mean.numpy(), device=device)
            images = fn.cast(fn.flip(images, horizontal=flip), dtype=types.FLOAT)
            return (images - mean) * float(normalization.scale[0])
        return fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=normalization.mean.tolist(),
            std=(1 / normalization.scale.double()).tolist(),
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    def close(self) -> None:
        del self._graph


def _reflect_pad(images: DataNode, padding: int) -> DataNode:
    """Pad by reflection, with slices, flips and concatenations: DALI pads with constants only."""
    last = IMAGE_SIZE - 1
    top = fn.flip(images[1 : 1 + padding], vertical=1, horizontal=0)
    bottom = fn.flip(images[last - padding : last], vertical=1, horizontal=0)
    images = fn.cat(top, images, bottom, axis=0)
    left = fn.flip(images[:, 1 : 1 + padding])
    right = fn.flip(images[:, last - padding : last])
    return fn.cat(left, images, right, axis=1)


def _gpu_number(device: torch.device) -> int:
    """Return the index of the GPU: for `cuda` without one, PyTorch's current device, which differs between ranks."""
    return torch.cuda.current_device() if device.index is None else device.index
