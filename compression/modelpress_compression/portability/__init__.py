"""Whether one file answers alike in other versions of onnxruntime and on other CPUs, seen by running it there.

levels        CPUs that this one, or an emulator, can stand in for
environments  folders with a version of onnxruntime, with one that is trapped, with an AArch64 system; kept
trapping      onnxruntime that is told which instructions there are
runner        what runs in all of those places, by itself
verify        the same samples everywhere, and the comparison

`python -m modelpress_compression.portability FILE` is the command, for `compress-client verify`.
"""

from modelpress_compression.portability.verify import Wanted, verify

__all__ = ["Wanted", "verify"]
