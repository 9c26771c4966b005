"""Lets ``import torchvision`` work beside a torch that its C++ extension does not fit.

PyPI's torchvision is built for PyPI's torch, the one with CUDA. Beside a torch without CUDA its
extension does not load. torchvision allows that, except in one place: it registers shapes for two
operators that only the extension declares, and so ``from torchvision import models`` ends with
``operator torchvision::nms does not exist``.

launch/setup.sh copies this file into the environment's site-packages, with a file
torchvision-operators.pth whose one line calls `install` at every start of Python. That puts one
finder into ``sys.meta_path`` and imports nothing. The finder waits for ``torchvision.extension``,
the module in which torchvision loads its extension, always before that place. Once this module has
run, operators that are missing are declared and the finder goes. Where the extension loads, none
are missing, and nothing is declared.

Models, transforms and data sets then work as ever. What needs the extension, such as
``torchvision.ops.nms`` and ``torchvision.io.read_image``, still says that it is not there.
"""

import sys

MODULE = "torchvision.extension"
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries = []  # torch forgets what a library declares when the library is freed


def install():
    """Put the finder in place, once, unless it comes too late."""
    if MODULE not in sys.modules and not any(isinstance(each, Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def declare_missing():
    """Declare those operators that neither the extension nor anyone else has declared."""
    import torch

    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # there can be others
        for name in missing:
            library.define(name + OPERATORS[name])
        _libraries.append(library)


class Finder:
    """Finds one module, as the other finders do, and has `declare_missing` run after it."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader, self)
                return spec
        return None


class Loader:
    """Runs a module by its own loader, which it gives back to the module first."""

    def __init__(self, loader, finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        declare_missing()
        # A new list: other threads may be going through the old one, and would miss a finder.
        sys.meta_path = [each for each in sys.meta_path if each is not self.finder]
