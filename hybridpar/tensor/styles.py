"""What each style of a tensor plan makes of a module.

`build` gives the module that takes the place of another, which may be the same one. Styles that replace nothing say
only what the module's inputs are; the plan turns that into specs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hybridpar.seeds import Draw
from hybridpar.tensor import attention, heads, hooks, norm, space
from hybridpar.tensor.channels import ChannelNorm
from hybridpar.tensor.conv import ConvColumn, ConvGroups, ConvRow
from hybridpar.tensor.dropout import Cut, Dropout, Held
from hybridpar.tensor.embedding import SequenceEmbedding, VocabularyEmbedding
from hybridpar.tensor.gates import checked
from hybridpar.tensor.linear import ColumnLinear, RowLinear, WholeLinear, packed
from hybridpar.tensor.recurrent import Recurrent
from hybridpar.tensor.sequence import Sequence
from hybridpar.wires.axis import Axis

# Those with specs of their own.
Layer = (
    ColumnLinear
    | RowLinear
    | WholeLinear
    | heads.HeadEmbedding
    | VocabularyEmbedding
    | SequenceEmbedding
    | Recurrent
    | ConvColumn
    | ConvRow
    | ConvGroups
    | ChannelNorm
)
Channels = nn.Dropout1d | nn.Dropout2d | nn.Dropout3d


@dataclass(frozen=True)
class Site:
    """A module, where it stands, and what its replacement needs."""

    name: str  # global
    module: nn.Module
    parent: nn.Module
    axis: Axis
    draw: Draw
    sequence: Sequence | None


def build(style: str | None, site: Site) -> nn.Module:
    """The module that stands at `site` from now on. Without a style only a dropout changes.

    ValueError where the style does not go with the module.
    """
    if style is not None:
        return STYLES[style](site)
    return _masked(site, None) if isinstance(site.module, nn.Dropout | Channels) else site.module


def _column(site: Site) -> nn.Module:
    return ColumnLinear(site.module, site.axis, sequence=site.sequence, name=site.name)


def _row(site: Site) -> nn.Module:
    return RowLinear(site.module, site.axis, sequence=site.sequence, name=site.name)


def _packed(site: Site) -> nn.Module:
    return ColumnLinear(site.module, site.axis, packed(site.module, site.axis, site.name), site.sequence, site.name)


def _gathered(site: Site) -> nn.Module:
    if site.sequence is not None:
        raise ValueError(f'{site.name}: style "gathered" does not go with sequence parallelism; use "column"')
    return WholeLinear(site.module, site.axis, site.name)


def _heads(site: Site) -> nn.Module:
    if site.sequence is not None:
        raise ValueError(f'{site.name}: style "heads" does not go with sequence parallelism; use "attention"')
    heads.shard(site.module, site.axis, site.draw, site.name)
    return site.module


def _vocabulary(site: Site) -> nn.Module:
    return VocabularyEmbedding(site.module, site.axis, site.sequence, site.name)


def _sequence(site: Site) -> nn.Module:
    return SequenceEmbedding(site.module, site.sequence, site.name)


def _attention(site: Site) -> nn.Module:
    attention.shard(site.module, site.axis, site.draw, site.sequence, site.name)
    return site.module


def _norm(site: Site) -> nn.Module:
    norm.check(site.module, site.sequence is not None, site.name)
    return site.module


def _recurrent(site: Site) -> nn.Module:
    if site.axis.size == 1 and not checked(site.module, 1, site.name).dropout:
        return site.module  # torch's own: nothing is cut, and it draws nothing
    made = Recurrent(site.module, site.axis, site.draw, site.name)
    site.parent.register_forward_pre_hook(made.restart)
    return made


def _whole(site: Site) -> nn.Module:
    return build(None, site)


def _partial(site: Site) -> nn.Module:
    return site.module


def _dropout(site: Site) -> nn.Module:
    return _masked(site, site.sequence)


def _hidden_dropout(site: Site) -> nn.Module:
    columns = [child for child in site.parent.children() if isinstance(child, ColumnLinear | ConvColumn)]
    if len({column.parts for column in columns}) != 1:
        raise ValueError(
            f'{site.name}: style "hidden dropout" takes its cut from the column layers beside it, and there are '
            f"{len(columns)} of {len({column.parts for column in columns})} different cuts"
        )
    dim = 1 if isinstance(columns[0], ConvColumn) else -1
    return _masked(site, Held(dim, columns[0].parts[site.axis.index]))


def _masked(site: Site, cut: Cut | None) -> nn.Module:
    if not isinstance(site.module, nn.Dropout | Channels):
        raise ValueError(f'{site.name} is a {type(site.module).__name__} and style "dropout" is for nn.Dropout')
    channels = not isinstance(site.module, nn.Dropout)
    mask = Dropout(site.module.p, site.name, site.draw, cut, channels).train(site.module.training)
    return hooks.carry(site.module, mask)


def _conv_column(site: Site) -> nn.Module:
    return ConvColumn(site.module, site.axis, site.name)


def _conv_row(site: Site) -> nn.Module:
    return ConvRow(site.module, site.axis, site.name)


def _conv_groups(site: Site) -> nn.Module:
    return ConvGroups(site.module, site.axis, site.name)


def _conv_norm(site: Site) -> nn.Module:
    return ChannelNorm(site.module, site.axis, site.name)


def _space(site: Site) -> nn.Module:
    space.shard(site.module, site.axis, site.name, site.draw)
    return site.module


STYLES: dict[str, Callable[[Site], nn.Module]] = {
    "column": _column,
    "row": _row,
    "packed column": _packed,
    "gathered": _gathered,
    "vocabulary": _vocabulary,
    "sequence": _sequence,
    "attention": _attention,
    "heads": _heads,
    "norm": _norm,
    "dropout": _dropout,
    "hidden dropout": _hidden_dropout,
    "recurrent": _recurrent,
    "partial": _partial,
    "whole": _whole,
    "conv column": _conv_column,
    "conv row": _conv_row,
    "conv groups": _conv_groups,
    "conv norm": _conv_norm,
    "space": _space,
}
