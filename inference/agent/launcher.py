"""Starts SGLang. Run by the interpreter that has SGLang, with SGLang's options as arguments; imports nothing of ours.

What SGLang imports takes most of its start, so it is imported at once, and only then is one line read from standard
input: a JSON list of further options, those that name the model. End of file instead means that no server is wanted.

With SGLANG_USE_CPU_ENGINE=1 placeholders stand in for what has no CPU build. They are set up at the top level because
processes that SGLang spawns import this file again.
"""

import contextlib
import ctypes
import gc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import MutableSequence

ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
PR_SET_PDEATHSIG = 1
_keep: list[object] = []  # torch forgets a library's definitions with the object that made them


class _MissingKernels(types.ModuleType):
    """`sgl_kernel` has only CUDA builds. A few of its names are imported on a CPU, none is called; calling raises."""

    __path__: MutableSequence[str] = []  # noqa: RUF012  a module's, which import looks for

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} does not exist in an installation for CPUs")

        return missing


def _prepare_for_cpu() -> None:
    if importlib.util.find_spec("sgl_kernel") is None:
        kernels = _MissingKernels("sgl_kernel")
        kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        sys.modules["sgl_kernel"] = kernels

    import torch

    torch.cuda.synchronize = lambda *_, **__: None  # /weights_checker calls it on every device
    try:
        torch.ops.load_library(_operators_of_torchvision())
    except (OSError, LookupError):
        # PyPI's torchvision is linked against CUDA; to import it, the schemas of its operators suffice
        torchvision = torch.library.Library("torchvision", "DEF")
        _keep.append(torchvision)
        for name in ("nms", "qnms"):
            torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _operators_of_torchvision() -> str:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise LookupError("torchvision")
    return os.path.join(os.path.dirname(found.origin), "_C.so")


def _fork_instead_of_spawn() -> None:
    """Let SGLang's processes share what is imported here instead of importing it again, each at 10 s of CPU time.

    Safe before any thread or device is in use, which without CUDA is so when SGLang starts them.
    """
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None


def main() -> None:
    # the agent asked the kernel for SIGTERM at its death, which SGLang would answer with a drain of any length
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    gc.disable()  # a fifth of the time of these imports would be garbage collection
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints import http_server  # noqa: F401  imported by run_server otherwise
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if ON_CPU:  # what the forked processes need besides, while there is time for it
        with contextlib.suppress(ImportError):
            import sglang.srt.models.registry  # noqa: F401

    gc.freeze()  # and neither this process nor those it forks need ever look at what they made
    gc.enable()
    line = sys.stdin.readline()
    if not line:
        return
    if ON_CPU:
        _fork_instead_of_spawn()
    load_plugins()
    try:
        run_server(prepare_server_args([*sys.argv[1:], *json.loads(line)]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if ON_CPU:
    _prepare_for_cpu()
if __name__ == "__main__":
    main()
