"""How are timm and torchvision imported beside any torch?

The package index carries only the CUDA build of torchvision. Beside a CPU-only torch its compiled library cannot
load, and `import torchvision` (hence `import timm`, which imports it) dies of "operator torchvision::nms does not
exist". Declaring the schemas of the operators that torchvision registers Python code for lets the import through;
models and transforms work, the compiled operators themselves (nms, roi_align) stay absent and say so when called.
"""

import logging
import sys
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def import_torchvision() -> ModuleType:
    """`torchvision`, with its missing operators declared if, and only if, the import fails without."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        logger.debug("torchvision was built for another torch: importing it without its compiled operators")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # halves of the failed import
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision
    return torchvision


def import_timm() -> ModuleType:
    """`timm`, after making sure that the torchvision it needs can be imported."""
    import_torchvision()
    import timm

    return timm
