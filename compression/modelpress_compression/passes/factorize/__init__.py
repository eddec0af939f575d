"""Factorization: one product becomes two or three cheaper ones, nearly equal to it.

config       the options
factorize    the pass: layers, choice, rewriting, repair, report
choice       which method and which ranks a layer gets
methods      the factorizations, and what each costs and errs
tables       embeddings: how rows are looked up, and how often each is read
layers       the products of a graph, and why some are left alone
writer       factors in the place of a layer
"""
