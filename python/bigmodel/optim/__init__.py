"""Optimizers over the multi-tensor ops: torch.optim's names, arguments and checkpoints, and one pass over memory."""

from bigmodel.optim.adagrad import Adagrad
from bigmodel.optim.adam import Adam, AdamW
from bigmodel.optim.clip import clip_grad_norm_
from bigmodel.optim.ema import EMA
from bigmodel.optim.sgd import SGD

__all__ = ["EMA", "SGD", "Adagrad", "Adam", "AdamW", "clip_grad_norm_"]
