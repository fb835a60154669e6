"""Training by Lightning, with the loader of fastresnet in place of a DataLoader.

usage: python examples/lightning_module.py [DATA] [EPOCHS]
"""

import sys

import lightning
import torch
import torch.nn.functional as F

import fastresnet


class Batches(torch.utils.data.IterableDataset):
    """Batches of a pipeline, each time those of the next epoch, as pairs of images and labels."""

    def __init__(self, dataset, batch_size, *, train):
        self.pipeline, self.number = fastresnet.open_pipeline(dataset, batch_size=batch_size, train=train), 0

    def __len__(self):
        return len(self.pipeline)

    def __iter__(self):
        self.number += 1
        for batch in self.pipeline.epoch(self.number - 1):
            yield batch.images[: batch.valid], batch.labels[: batch.valid]


class Classifier(lightning.LightningModule):
    def __init__(self, classes):
        super().__init__()
        self.network = fastresnet.create_model("resnet20", num_classes=classes)

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        hits = (self.network(images).argmax(1) == labels).float()
        self.log("accuracy", hits.mean(), batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


if __name__ == "__main__":
    data, epochs = sys.argv[1] if len(sys.argv) > 1 else "cifar10", int(sys.argv[2]) if len(sys.argv) > 2 else 10
    dataset = fastresnet.load_dataset(data)
    loaders = [
        torch.utils.data.DataLoader(Batches(dataset, size, train=train), batch_size=None)
        for size, train in ((128, True), (500, False))
    ]
    trainer = lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, logger=False)
    trainer.fit(Classifier(len(dataset.classes)), *loaders)
    print(f"test accuracy {100 * trainer.callback_metrics['accuracy']:.2f} %")
