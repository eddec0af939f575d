"""Products of 8-bit numbers as onnxruntime's kernels sum them up, whoever chose the numbers.

products       in which order the kernels of each operator add
saturation     what pairs of products can reach without VNNI, and weights for which that is exact
certificate    the proof of it, read off a finished model; and weights of a finished model made so
"""
