"""A subject as a user writes it, and several that are wrong in one way each."""

import torch
from pydantic import BaseModel, Field
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class MySubject:
    """A deep linear network along its training by gradient descent."""

    def __init__(self, width: int = 2, seed: int = 0) -> None:
        self.width, self.seed = width, seed
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(59, 5, generator=draw)
        self.outputs = self.inputs @ torch.randn(5, 3, generator=draw)

    def steps(self):
        return [0, 7, 20]

    def model(self, step):
        draw = torch.Generator().manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(5, self.width, bias=False), nn.Linear(self.width, 3, bias=False))
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.5, generator=draw)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(step):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(self.inputs), self.outputs).backward()
            optimiser.step()
        return model

    def loss(self, predict, batch):
        inputs, outputs = batch
        return nn.functional.mse_loss(predict(inputs), outputs)

    def batches(self, step):
        return DataLoader(TensorDataset(self.inputs, self.outputs), batch_size=16)


class WithSettings(MySubject):
    class Settings(BaseModel):
        width: int = Field(default=2, ge=1, le=7)
        seed: int = 0


class WithoutLoss:
    def steps(self): ...

    def model(self, step): ...

    def batches(self, step): ...


class NoCheckpoints(MySubject):
    def steps(self):
        return []


class OddSteps(MySubject):
    def steps(self):
        return ["first", "last"]


class NoModule(MySubject):
    def model(self, step):
        return super().model(step).state_dict()


class Fails(MySubject):
    def model(self, step):
        raise KeyError("weights")


class FailsAtBirth(MySubject):
    def __init__(self) -> None:
        super().__init__()
        raise FileNotFoundError("runs/7.pt")


class NotFinite(MySubject):
    def loss(self, predict, batch):
        return super().loss(predict, batch) / 0.0


class OddShape(MySubject):
    def loss(self, predict, batch):
        return (predict(batch[0]) - batch[1]).square().mean(dim=1)


class NoTensor(MySubject):
    def loss(self, predict, batch):
        return super().loss(predict, batch).item()


class Elsewhere(MySubject):
    def batches(self, step):
        return [(self.inputs.to("meta"), self.outputs.to("meta"))]


class Unreached(MySubject):
    def model(self, step):
        model = super().model(step)
        model.spare = nn.Linear(2, 2)
        model.forward = lambda inputs: model[1](model[0](inputs))
        return model


class Dropping(MySubject):
    def model(self, step):
        return nn.Sequential(*super().model(step), nn.Dropout(0.1))


class Normalising(MySubject):
    def model(self, step):
        return nn.Sequential(*super().model(step), nn.BatchNorm1d(3))


class NoBatches(MySubject):
    def batches(self, step):
        return []


class ForgotToReturn(MySubject):
    def batches(self, step):
        DataLoader(TensorDataset(self.inputs), batch_size=16)


class EmptyStream(MySubject):
    def batches(self, step):
        return iter(())


not_a_class = MySubject()
