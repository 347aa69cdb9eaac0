"""The router's softmax, top-k, statistics and gradient as Triton kernels.

A program takes blocks of tokens of one row and holds their (tokens, experts) tile in registers. Its
sums over tokens are stored plainly, one line per program, and a second kernel adds the lines of a
row in a fixed order: no atomics, no zero-filled buffers, two runs agree bit for bit. How many lines
there are follows from shapes alone. The float32 softmax adds in another order and uses another
exponential than torch's, so the last bits differ; where that makes a tie or breaks one, so may the
choice.
"""
