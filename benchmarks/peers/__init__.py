"""Peers: typical loaders and training loops of other libraries.

A module has `open_loader(dataset, *, batch_size, device, dtype, workers)`. It returns an iterable, which yields an
epoch's `(images, labels)` on the device. Images are [B, 3, 32, 32], channels_last, of `dtype`. They are randomly
cropped with 4 pixels of padding, randomly flipped and normalised with mean = std = 0.5. Partial batches are dropped.
Padding is black, and each image is cropped and flipped by itself, unless the module says otherwise.

Or it has `open_training(dataset, model, watch, *, batch_size, device, workers)`. It returns a function of the epoch's
number, which trains `model` and yields after each step. `watch` wraps the iterable of batches and times the waiting.
"""
