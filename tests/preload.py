"""What the fork server imports once, so that a process of a test starts at once.

A process has one fork server, which imports what was set last: whoever starts processes sets this.
"""

# ruff: noqa: F401

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hydra
import hypothesis
import lightning.pytorch
import open_clip
import pytest
import sklearn.linear_model
import timm
import torch
import torchmetrics
import transformers

import mmpretrain.cli
import mmpretrain.encoders
import mmpretrain.evaluation
import mmpretrain.losses
import mmpretrain.train
