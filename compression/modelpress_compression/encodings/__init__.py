"""The formats that quantized weights have in a graph, each with what writes it and what reads it.

qdq            DequantizeLinear: per tensor, per channel, in blocks; 2 to 32 bits; int32 biases
n_bits         com.microsoft MatMulNBits and GatherBlockQuantized: blocks along the rows, packed into bytes
packed         4 bits for the kernels of 8
folded         arithmetic that onnxruntime folds when it loads a model: 8 bits, 4 bits, float16
products       MatMulInteger and the other operators that multiply integers

weight         the weight itself, apart from its format; levels packed into bytes
operands       what each input of a quantized operator is
read           all readers in one: the quantized weights of a node
"""
