"""`shrink` removes dead channels from a model, and `shrink_report` explains the result.

`shrink` has three passes. All passes work on a graph of the model in which nested models are
flattened (`graph.py`):

1. Constant propagation (`plan.py`, `handlers.py`): find the channels whose value does not depend
   on the input. For example, a unit with zero weights always returns its activated bias.
2. Coupling (`plan.py`, `unions.py`): find sets of channels that are kept or removed together, such
   as channels that are added to each other. A set of channels is removed if no kernel needs its
   channels. A kernel does not need a channel if all kernel entries for the channel are zero. If a
   channel is constant, no kernel needs the channel, because a bias can replace the constant value.
3. Building (`build.py`, `copies.py`): slice the weights of the layers, and call each layer with its
   smaller weights to build the smaller model.

`dispatch.py` chooses the handler class for each kind of layer. The handler classes are in
`handlers.py`, `mixing.py` (normalization over channels, attention) and `indexing.py` (reductions,
slices, splits, padding). `coupling.py` describes the coupled channels as plain data, for training
and for users. `pipeline.py` runs the passes and compares the outputs of the given and the smaller
model. `explain.py` finds the reasons why dead channels are kept, and `report.py` prints the
reasons.
"""

from keras_dst._structure.coupling import ChannelGroup, CoupledChannels, channel_groups
from keras_dst._structure.pipeline import shrink
from keras_dst._structure.report import ChannelReport, GroupReport, ShrinkReport, shrink_report

__all__ = [
    "ChannelGroup",
    "ChannelReport",
    "CoupledChannels",
    "GroupReport",
    "ShrinkReport",
    "channel_groups",
    "shrink",
    "shrink_report",
]
