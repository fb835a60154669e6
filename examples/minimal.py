"""The whole idea in one file: ResNet-20 of He et al. 2015 on images that stay in memory, one step, one loop.

usage: python examples/minimal.py [DATA] [EPOCHS]

It takes the steps of `fastresnet train baseline --shortcut A --kernels torch --precision bf16 --compile off`.
"""

import itertools
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from pipelines import Augmentation, open_pipeline
from pipelines.prepare import find_dataset


class Block(nn.Module):
    """Two 3x3 convolutions, and around them a shortcut without parameters (option A of the paper)."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.stride, self.added = channels // inputs, (channels - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """6n + 2 weighted layers: a convolution, three stages of n blocks, and a linear layer."""

    def __init__(self, classes, n=3):
        super().__init__()
        widths = [16] * (n + 1) + [32] * n + [64] * n
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(*pair) for pair in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        return self.fc(self.blocks(F.relu(self.bn(self.conv(images)))).mean((2, 3)))


def train(data="cifar10", epochs=160, batch_size=128, lr=0.1, seed=0):
    """Train; return the mean training loss of each epoch, and the test accuracy in percent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = find_dataset(data, None, lambda *_: None)  # downloaded, or drawn, if it is missing

    # All images stay on the device. Each batch is cropped, flipped and normalised there in one go, and depends on
    # nothing but the seed, the epoch and the step.
    settings = {"device": device, "dtype": torch.bfloat16, "seed": seed, "augmentation": Augmentation()}
    train_loader = open_pipeline("resident", dataset, train=True, batch_size=batch_size, **settings)
    test_loader = open_pipeline("resident", dataset, train=False, batch_size=1000, **settings)

    torch.manual_seed(seed)
    network = ResNet(len(dataset.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=1e-4, fused=True)
    steps = epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(steps / 2), round(steps * 3 / 4)])

    def classify(images):
        with torch.autocast(device.type, torch.bfloat16):
            return network(images).float()

    def step(images, labels):
        loss = F.cross_entropy(classify(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.detach().double()

    losses, accuracy = [], 0.0
    with train_loader, test_loader:
        for epoch in range(epochs):
            network.train()
            started = time.perf_counter()
            total = sum(step(batch.images, batch.labels) for batch in train_loader.epoch(epoch))
            losses.append(float(total) / len(train_loader))  # the first wait for the device since the epoch began
            speed = len(train_loader) * batch_size / (time.perf_counter() - started)

            network.eval()
            with torch.no_grad():
                hits = ((classify(b.images).argmax(1) == b.labels)[: b.valid].sum() for b in test_loader.epoch(0))
                accuracy = 100 * int(sum(hits)) / len(dataset.test)
            print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, test accuracy {accuracy:.2f} %, {speed:,.0f} images/s")
    return losses, accuracy


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    train(*sys.argv[1:2], *map(int, sys.argv[2:3]))
