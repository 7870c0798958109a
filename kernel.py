"""Bit-planes: the form in which quantized weights are stored and multiplied.

A weight is w = sum_i alpha_i * b_i + shift with b_i in {-1, +1}. All b_i of one layer form bit-plane i (1 means +1);
alpha and shift are shared by `group_size` neighbouring columns of a row. One layout serves every device:

    bit_planes  int32  (n_bits, out/32, in/32, 32)      word [i, t, c, r]: plane i, row 32t + r, columns 32c .. 32c+31;
                                                        bit j of the word (1 << j) is column 32c + j
    alpha       fp16   (n_bits, out/32, in/group_size, 32)
    shift       fp16   (out/32, in/group_size, 32)

32 rows lie side by side, so one word of each is a 128-byte line: a coalesced load for a warp, whole vectors for a
CPU. Rows are padded with zeros to a multiple of 32. Storage is n_bits + 16 (n_bits + 1) / group_size bits per weight.

`codes` are the bits of one weight as an integer, plane 0 the most significant: for a uniform quantizer, where
alpha halves from plane to plane, they are the familiar 0 .. 2^n_bits - 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 32  # rows side by side, and columns in a word


def columns_per_group(in_features: int, group_size: int) -> int:
    """`group_size` with -1 (the whole row) resolved. Raises ValueError listing the sizes that do divide."""
    size = in_features if group_size == -1 else group_size
    if size < TILE or size % TILE or in_features % size:
        fitting = [s for s in range(TILE, in_features + 1, TILE) if in_features % s == 0]
        hint = f"try {', '.join(map(str, fitting))}, or -1 for the row" if fitting else f"it is no multiple of {TILE}"
        raise ValueError(f"in_features {in_features} cannot be cut into groups of {group_size} ({hint})")
    return size


def bits_per_weight(n_bits: int, group_size: int) -> float:
    """Stored bits per weight with the fp16 alphas and shift of each group counted."""
    return n_bits + 16 * (n_bits + 1) / group_size


def to_tiles(x: Tensor) -> Tensor:
    """(out, ...) -> (out/32, ..., 32): pad the rows with zeros, then move the 32 rows of a tile last."""
    padding = x.new_zeros(-x.shape[0] % TILE, *x.shape[1:])
    return torch.cat((x, padding)).unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def from_tiles(x: Tensor, out_features: int) -> Tensor:
    """(out/32, ..., 32) -> (out, ...): the inverse of `to_tiles`."""
    return x.movedim(-1, 1).flatten(0, 1)[:out_features]


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """codes: (out, in) uint8, below 2^n_bits -> bit_planes, int32 as above. Raises ValueError on what does not fit."""
    if codes.shape[1] % TILE:
        raise ValueError(f"in_features {codes.shape[1]} is not a multiple of {TILE}")
    if codes.numel() and int(codes.max()) >= 2**n_bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {n_bits} bits")
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)  # of the bits within a byte
    planes = []
    for i in range(n_bits):
        bits = (codes >> (n_bits - 1 - i)) & 1  # (out, in)
        octets = (bits.unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)  # (out, in/8)
        planes.append(to_tiles(octets.view(torch.int32)))  # four bytes a word, the first one lowest (little-endian)
    return torch.stack(planes)


def unpack_plane(plane: Tensor, out_features: int) -> Tensor:
    """plane: (out/32, in/32, 32) int32 -> its bits, (out, in) uint8."""
    octets = plane.view(torch.uint8).unflatten(-1, (TILE, 4))  # (out/32, in/32, 32, 4)
    octets = octets.movedim(2, 1).flatten(2).flatten(0, 1)[:out_features]  # (out, in/8)
    places = torch.arange(8, dtype=torch.uint8, device=plane.device)
    return ((octets.unsqueeze(-1) >> places) & 1).flatten(1)


def unpack(bit_planes: Tensor, out_features: int) -> Tensor:
    """bit_planes: int32 as above -> codes, (out_features, in) uint8. The inverse of `pack`."""
    codes = 0
    for plane in bit_planes:
        codes = (codes << 1) | unpack_plane(plane, out_features)
    return codes


class BCQLinear(nn.Module):
    """y = x @ W.T with W held as bit-planes. Built empty; filled by `from_codes` or `load_state_dict`.

    Raises ValueError if n_bits is not 1..8 or the group size does not divide in_features."""

    def __init__(self, in_features: int, out_features: int, n_bits: int, group_size: int = -1):
        super().__init__()
        if n_bits not in range(1, 9):
            raise ValueError(f"{n_bits} bits: choose 1 to 8")
        self.in_features, self.out_features, self.n_bits = in_features, out_features, n_bits
        self.group_size = columns_per_group(in_features, group_size)
        tiles, groups = -(-out_features // TILE), in_features // self.group_size
        self.register_buffer("bit_planes", torch.zeros(n_bits, tiles, in_features // TILE, TILE, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(n_bits, tiles, groups, TILE, dtype=torch.float16))
        self.register_buffer("shift", torch.zeros(tiles, groups, TILE, dtype=torch.float16))

    @classmethod
    def from_codes(cls, codes: Tensor, alpha: Tensor, shift: Tensor) -> "BCQLinear":
        """Pack one layer.

        codes: (out, in) uint8
        alpha: (out, in/group_size, n_bits) float, rounded to fp16 here
        shift: (out, in/group_size) float, rounded to fp16 here
        Raises ValueError if alpha or shift does not fit into fp16."""
        out_features, groups, n_bits = alpha.shape
        layer = cls(codes.shape[1], out_features, n_bits, codes.shape[1] // groups)
        layer.bit_planes = pack(codes, n_bits)
        layer.alpha = to_tiles(alpha.half()).movedim(2, 0).contiguous()  # (out/32, groups, n_bits, 32) -> n_bits first
        layer.shift = to_tiles(shift.half())
        if not (layer.alpha.isfinite().all() and layer.shift.isfinite().all()):
            raise ValueError("alpha or shift is NaN or beyond the range of fp16")
        return layer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out_features, in_features): the sum over planes, added up in float32 one plane at a time."""

        def per_weight(x: Tensor) -> Tensor:  # (out/32, in/group_size, 32) fp16 -> (out, in) float32
            return from_tiles(x, self.out_features).float().repeat_interleave(self.group_size, dim=1)

        weight = per_weight(self.shift)
        for plane, alpha in zip(self.bit_planes, self.alpha):
            sign = unpack_plane(plane, self.out_features).float() * 2 - 1
            weight.addcmul_(sign, per_weight(alpha))
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features) in the dtype of x."""
        return F.linear(x, self.dequantize(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n_bits={self.n_bits}, group_size={self.group_size}"
