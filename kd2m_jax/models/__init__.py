"""Networks in Flax NNX, a registry by name, and weights from torch.

Every network maps a batch of channels-last images to `kd2m_jax.Outputs`. In any
``dtype`` the parameters, the statistics of batch normalisation, the features and the logits stay
in float32; with a ``dtype`` of float64, features and logits are in float64. Only the activations
between layers, and so the maps, are in ``dtype``.

A new network is in training mode. After ``eval()`` it uses its running statistics. They differ
from torch's in one point: a training step here averages the *biased* variance of the batch,
torch the unbiased one (n against n - 1 for n = batch size x height x width).
"""

from kd2m_jax.models._mlp import MLP as MLP
from kd2m_jax.models._mlp import mlp_student as mlp_student
from kd2m_jax.models._mlp import mlp_teacher as mlp_teacher
from kd2m_jax.models._mobilenet import MobileNetV2 as MobileNetV2
from kd2m_jax.models._registry import MODELS as MODELS
from kd2m_jax.models._registry import build as build
from kd2m_jax.models._resnet import BasicBlock as BasicBlock
from kd2m_jax.models._resnet import Bottleneck as Bottleneck
from kd2m_jax.models._resnet import ResNet as ResNet
from kd2m_jax.models._resnet import resnet8 as resnet8
from kd2m_jax.models._resnet import resnet8x4 as resnet8x4
from kd2m_jax.models._resnet import resnet18 as resnet18
from kd2m_jax.models._resnet import resnet20 as resnet20
from kd2m_jax.models._resnet import resnet32x4 as resnet32x4
from kd2m_jax.models._resnet import resnet34 as resnet34
from kd2m_jax.models._resnet import resnet50 as resnet50
from kd2m_jax.models._resnet import resnet56 as resnet56
from kd2m_jax.models._resnet import resnet101 as resnet101
from kd2m_jax.models._torch_weights import load_torch_weights as load_torch_weights
from kd2m_jax.models._vgg import VGG as VGG
from kd2m_jax.models._vit import ViT as ViT
from kd2m_jax.models._wide_resnet import WideResNet as WideResNet

# For pydoc and `import *`: what is imported here is what is public.
__all__ = [name for name in dir() if name[0] != "_"]  # pyright: ignore[reportUnsupportedDunderAll]
