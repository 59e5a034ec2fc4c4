"""What the fork server imports once, so that a rank starts at once."""

# ruff: noqa: F401

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hydra
import lightning.pytorch
import timm
import torch
import torchmetrics

import mmpretrain.cli
import mmpretrain.evaluation
import mmpretrain.train
