"""What users would pick instead, written as its users write it: the yardsticks.

Each module has `open_loader(dataset, *, batch_size, device, dtype, workers)`, which returns something to iterate over
once per epoch, that yields `(images, labels)` on the device: images [B, 3, 32, 32] channels_last of `dtype`, randomly
cropped with 4 pixels of padding, randomly flipped and normalised with mean = std = 0.5; ragged last batches dropped.

Or it has `open_training(dataset, model, watch, *, batch_size, device, workers)`, which returns a function of the
epoch's number: that trains `model`, with its batches taken through `watch`, which times the waiting, and yields after
each step.
"""
