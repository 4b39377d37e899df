"""What the fused operator is given, the same for every backend.

Legend: B rows, A attributes, O objects, S feasible pairs, F feasible pairs of the batch's rows.
"""

from typing import NamedTuple

from torch import Tensor


class FeasibleTable(NamedTuple):
    """Omega_o of every object, resident on the device.

    Attributes:
        indptr: int64 [O + 1].
        indices: int32 [S], attributes ascending within an object.
        largest: attributes of the greatest set, which decides how much of a GPU's memory a draw
            takes; 0: not known, all attributes are provided for.
    """

    indptr: Tensor
    indices: Tensor
    largest: int = 0


class Draw(NamedTuple):
    """The draw of Fig. 3, inside of the operator.

    Attributes:
        weight_indptr: int64 [B + 1]; each row is as long as its object's feasible set.
        inverse_weight: float32 [F], max likelihood / likelihood (`inverse_weights`); what is not
            positive and finite cannot be drawn.
        num_ignore: NUM_IGNORE >= 0; -1: the whole drawing set.
        over_unannotated: draw among the unannotated feasible attributes alone.
        uid, visit: int64 [B].
        seed: int64 [1].
    """

    weight_indptr: Tensor
    inverse_weight: Tensor
    num_ignore: int
    over_unannotated: bool
    uid: Tensor
    visit: Tensor
    seed: Tensor


class Labels(NamedTuple):
    """Annotations as a CSR matrix.

    Attributes:
        indptr: int64 [B + 1].
        code: int32, attribute * 2 + 1 for present, attribute * 2 for absent.
    """

    indptr: Tensor
    code: Tensor
