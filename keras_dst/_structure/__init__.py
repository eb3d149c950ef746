"""Dead channels removed for good: `shrink` makes a smaller dense model of one with zeros.

Three passes over the model's graph, nested models laid out flat (`graph`). Forwards: which channels
hold the same number whatever the input, and which number. Then which channels live or die together
(`groups`): those that a layer hands on, those that an addition adds; `rules` says both, for every
kind of layer. A channel can go where every kernel that reads it can do without (`plan`): its
weights for it are zero, or the number is a constant, which moves into the bias. Last, the graph is
built anew from what is left (`build`). What stays though it is dead has a reason (`reasons`).
"""

from keras_dst._structure.pipeline import shrink
from keras_dst._structure.report import ChannelReport, ShrinkReport, shrink_report

__all__ = ["ChannelReport", "ShrinkReport", "shrink", "shrink_report"]
