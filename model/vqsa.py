"""VQSA: trunk → codebook → fusion → two-token self-attention → head.

Shapes: B = images, H, W = image size, D = feature dimension, h, w = feature map size, C = classes, K = codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import TwoTokenAttention
from model.backbone import load_weights, make_trunk
from model.codebook import Codebook
from model.config import PASSED_IN, ModelConfig
from model.head import Head
from model.losses import cross_entropy, total_loss


class Losses(NamedTuple):
    """What a forward pass with labels returns; scalars are float32."""

    loss: Tensor
    """What to minimise: vq + β·commit + λ·ce."""

    ce: Tensor
    """Cross entropy, unweighted."""

    vq: Tensor
    """L_vq, unweighted; zero without a codebook."""

    commit: Tensor
    """L_cmt, unweighted; zero without a codebook."""

    logits: Tensor
    """(B, C), with gradients."""

    code_index: Tensor | None
    """int64 codes, (B, h, w) for quantise "map", (B,) for "pooled", None without a codebook. The nearest
    code of each feature, with top_k > 1 too; −1 for a feature that is not finite."""

    finite: Tensor
    """(B,) bool, whether every feature of the image is finite."""

    features: Tensor | None
    """(N, D) what was quantised, without gradients: what `VQSA.update_codebook` wants. None unless the
    configuration has ema, revive_after or centre."""

    usage: Tensor | None = None
    """int64 (K,), how many of the features have each code in code_index; None as `features`."""


class Features(NamedTuple):
    """What a forward pass with return_features=True returns."""

    logits: Tensor
    """(B, C)."""

    map: Tensor
    """(B, D, h, w), the trunk's output."""

    z: Tensor
    """(B, D), the pooled feature."""

    quantised: Tensor | None
    """(B, D) float32, the pooled codes ("map") or the code of the pooled feature ("pooled")."""

    code_index: Tensor | None
    """As in Losses."""

    sqdist: Tensor | None
    """float32, shape of code_index: the distance that the search minimised."""

    fused: Tensor
    """(B, D) or (B, 2D), the input of the head."""

    attention: Tensor | None
    """(B, 2, 2) float32 weights [k, q], tokens (code, feature); None without attention."""


class VQSA(nn.Module):
    """The classifier of the paper, its ablations, and the authors' variant, by ModelConfig.

    quantise "map" (paper): every position is quantised, then z and its code are averaged over positions.
    quantise "pooled" (authors' code): z is averaged first, then quantised. quantise "none": trunk and one
    layer.

    Every parameter takes part in every forward pass with labels, in every variant.

    Args:
        config: the choices.
        num_classes: C.
        trunk: the trunk itself, for config.trunk "module": see model.map_trunk.MapTrunk.

    Raises:
        ValueError, FileNotFoundError: no classes, a trunk that gives no map, or pretrained weights that are
            not there or do not fit.
    """

    def __init__(self, config: ModelConfig, num_classes: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"a classifier needs at least one class, got {num_classes}")
        self.config = config
        self.num_classes = num_classes
        self.classes: tuple[str, ...] = ()
        """Names of the outputs, in order; empty unless `model.load` knew them."""
        self.trunk = make_trunk(config, trunk)
        dim = self.trunk.dim
        quantised = config.quantise != "none"
        self.codebook = (
            Codebook(
                config.codes, dim, config.metric, config.init, config.init_seed, config.reduction,
                config.search_memory_mib, kmeans_iterations=config.kmeans_iterations, top_k=config.top_k,
                top_k_weights=config.top_k_weights, ema=config.ema, ema_epsilon=config.ema_epsilon,
                revive_after=config.revive_after, centre=config.centre,
            )
            if quantised
            else None
        )  # fmt: skip
        self.attention = (
            TwoTokenAttention(dim, config.attention_scale, config.released_eval_scale)
            if config.attention
            else None
        )
        self.head = Head(dim, num_classes, paired=quantised and config.fusion == "concat")
        # The codebook's moving state is the same on every rank by construction; DistributedDataParallel would
        # send it from rank to rank in every forward pass.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith("codebook.")
        ]
        if config.weights:
            load_weights(self.trunk, self.head.fc, config.weights)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, return_features: bool = False
    ) -> Tensor | Losses | Features:
        """Classify.

        Args:
            images: (B, 3, H, W) floating, normalised; channels_last is kept.
            labels: (B,) int64 in [0, C).
            return_features: give the intermediate results instead.

        Returns:
            logits (B, C); with labels a Losses; with return_features a Features.

        Raises:
            ValueError: labels and return_features together; a codebook that has no codes yet, in evaluation.
        """
        if labels is not None and return_features:
            raise ValueError(
                "VQSA gives either losses (labels) or features (return_features); call it twice for both"
            )
        map_BDhw: Tensor = self.trunk(images)
        z_BD = _pool(map_BDhw)
        zero = torch.zeros((), device=z_BD.device)
        code_BD = code_index = sqdist = attention_B22 = None
        vq = commit = zero
        fused = z_BD
        features_ND = usage_K = None
        if self.codebook is not None:
            features_ND = self._features(map_BDhw)
            result = self.codebook(features_ND)
            code_BD, code_index, sqdist = result.quantised_ND, result.index_N, result.sqdist_N
            if self.config.quantise == "map":
                batch, dim, height, width = map_BDhw.shape
                code_BD = code_BD.view(batch, height * width, dim).mean(1)
                code_index = code_index.view(batch, height, width)
                sqdist = sqdist.view(batch, height, width)
            vq, commit, usage_K = result.vq_loss, result.commit_loss, result.usage_K
            if self.config.fusion == "replace":
                fused = code_BD
            elif self.config.fusion == "add":
                fused = z_BD + code_BD
            elif self.attention is None:
                fused = torch.cat([code_BD, z_BD], dim=1)
            else:
                tokens_B2D, attention_B22 = self.attention(code_BD, z_BD)
                fused = tokens_B2D.flatten(1)
        logits: Tensor = self.head(fused)
        if return_features:
            return Features(logits, map_BDhw, z_BD, code_BD, code_index, sqdist, fused, attention_B22)
        if labels is None:
            return logits
        ce = cross_entropy(logits, labels)
        loss = total_loss(ce, vq, commit, self.config.beta, self.config.lambda_ce)
        moving = self.codebook is not None and self.codebook.upkeep is not None
        kept_ND = features_ND.detach() if moving and features_ND is not None else None
        finite_B = z_BD.detach().isfinite().all(1)
        kept_K = usage_K if moving else None
        return Losses(loss, ce, vq, commit, logits, code_index, finite_B, kept_ND, kept_K)

    @torch.no_grad()
    def initialise_codebook(self, *images: Tensor) -> None:
        """Start the codes from these images if they wait for data, else do nothing.

        The first training pass does it by itself, from its own micro-batch. Calling this first takes the whole
        global batch under gradient accumulation, and keeps the draw out of a compiled graph. Running statistics
        are left as they were. On several ranks all must call it.

        Args:
            images: this rank's micro-batches of one global batch, (B, 3, H, W) each.
        """
        if self.codebook is None or self.codebook.is_initialised:
            return
        z_ND = torch.cat([self.codebook_features(image_BCHW) for image_BCHW in images])
        self.codebook.initialise_from(z_ND, parts=len(images))

    @torch.no_grad()
    def codebook_features(self, images: Tensor) -> Tensor:
        """What would be quantised for these images, (N, D), in the present mode.

        Running statistics are left as they were.

        Args:
            images: (B, 3, H, W).
        """
        statistics = [(buffer, buffer.clone()) for buffer in self.trunk.buffers()]
        map_BDhw = self.trunk(images)
        for buffer, before in statistics:
            buffer.copy_(before)
        return self._features(map_BDhw)

    @torch.no_grad()
    def update_codebook(self, *outputs: Losses) -> None:
        """Moving average, revival and running centre of the codebook; nothing where none is on.

        To be called after each optimiser step, on several ranks on all of them.

        Args:
            outputs: what the forward passes of the step returned, one per micro-batch of this rank.
        """
        if self.codebook is None or self.codebook.upkeep is None:
            return
        z_ND = torch.cat([out.features for out in outputs if out.features is not None])
        index_N = torch.cat([out.code_index.flatten() for out in outputs if out.code_index is not None])
        used = [out.usage for out in outputs if out.usage is not None]
        usage_K = torch.stack(used).sum(0) if len(used) == len(outputs) else None
        self.codebook.update(z_ND, index_N, parts=len(outputs), usage_K=usage_K)

    def _features(self, map_BDhw: Tensor) -> Tensor:
        """What is quantised: every position of the map, or its mean."""
        if self.config.quantise == "pooled":
            return _pool(map_BDhw)
        # (B, h, w, D) is how channels_last lies in memory: no copy there.
        return map_BDhw.permute(0, 2, 3, 1).reshape(-1, map_BDhw.shape[1])


def _pool(map_BDhw: Tensor) -> Tensor:
    """Mean over positions in float32: bfloat16's own sum would cost the feature its last digits."""
    return map_BDhw.float().mean((2, 3))


def build(config: ModelConfig, num_classes: int, trunk: nn.Module | None = None) -> VQSA:
    """Build the model that a configuration describes, on a trunk of one's own if one is passed.

    Args:
        config: the choices. With a trunk passed, config.trunk is not looked at.
        num_classes: number of classes.
        trunk: a module from images (B, 3, H, W) to a feature map (B, D, h, w); see model.map_trunk.MapTrunk.
    """
    if trunk is not None:
        config = ModelConfig.model_validate({**config.model_dump(), "trunk": PASSED_IN})
    return VQSA(config, num_classes, trunk)
