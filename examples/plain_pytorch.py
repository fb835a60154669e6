"""Training loop of one's own, with the loader of fastresnet in place of a DataLoader.

usage: python examples/plain_pytorch.py [DATA] [EPOCHS]
"""

import sys

import torch
import torch.nn.functional as F

import fastresnet

data, epochs = sys.argv[1] if len(sys.argv) > 1 else "cifar10", int(sys.argv[2]) if len(sys.argv) > 2 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
dataset = fastresnet.load_dataset(data)
train_loader = fastresnet.open_pipeline(dataset, batch_size=128, device=device)
test_loader = fastresnet.open_pipeline(dataset, batch_size=500, device=device, train=False)

model = fastresnet.create_model("resnet20", num_classes=len(dataset.classes))
model = model.to(device, memory_format=torch.channels_last)  # as the images of the loader
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=epochs * len(train_loader))

with train_loader, test_loader:
    for epoch in range(epochs):
        model.train()
        for batch in train_loader.epoch(epoch):
            loss = F.cross_entropy(model(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.no_grad():
            hits = [
                (model(batch.images).argmax(1) == batch.labels)[: batch.valid].sum().item()
                for batch in test_loader.epoch(0)
            ]
        print(f"epoch {epoch + 1}: test accuracy {100 * sum(hits) / len(dataset.test):.2f} %")
