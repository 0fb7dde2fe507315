"""Which classes a head takes for which."""

from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, per_class, top_confusions
from fgvc.studies.confusion.show import ClassReport, confusion_figure, plot_confusion, write_class_report

__all__ = [
    "ClassReport",
    "confusion_figure",
    "confusion_matrix",
    "confusion_order",
    "per_class",
    "plot_confusion",
    "top_confusions",
    "write_class_report",
]
