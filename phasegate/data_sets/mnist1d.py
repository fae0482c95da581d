"""Generate MNIST-1D (Greydanus & Kobak 2024, arXiv 2011.14439) offline, and check it against the published file."""

import random
from pathlib import Path

import numpy as np

from phasegate.base.errors import UserError
from phasegate.base.files import sha256
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import Split

SHA256 = {  # of the float32 bytes, labels too; x and y as published, then their test split, then what is generated
    "x": "d53506bddd12d3b72c7153b1ae7f34807724b1dd078a7273809bf9d0792319f6",
    "y": "421e66a35fdb5322f6546df2bcb7ebe19575203e49ddb3bfa315ecf707f4b709",
    "x_published": "30addc43827c82aafa5db8bc97cea63349ca687e87db2f201cc4f5415d9a4ebd",
    "y_published": "d822b797eaf5df83aa5b69ae97285cd35dfa54c2f9a0287e03f56cb0f8874f07",
    "x_validation": "8cdb3d76001734c597cbdd1ed47147267b148f7fd71eda58ef2e3f3f84d313e6",
    "y_validation": "ca1ed95fb0c6f3828fe83b6191452d5409314d3a433e749e157235e69bebb0e6",
    "x_test": "0bbc6b7089c3353de852ad5d4ea16b4550d9d9cab81cb917b65220b1ee0a8448",
    "y_test": "a35cc3f4679bc21fc97faf465767f4e7c53d4cc619c2e11b29b1943bed5f4cd0",
}
GENERATED = {"validation": (43, 2_000), "test": (44, 10_000)}  # seed, examples; the published data set has seed 42


def load(_: Path | None = None) -> Raw:
    """Generate the published 4,000 train and 1,000 test examples, x (N, 1, 40), and 12,000 others.

    Of these, 2,000 are for validation, and 10,000 are `test`: the published ones are too few to tell models apart.
    """
    from mnist1d import data as mnist1d  # type: ignore[import-untyped, unused-ignore]  # late: imports matplotlib

    python_state, numpy_state = random.getstate(), np.random.get_state()  # mnist1d seeds the global generators
    try:
        made = mnist1d.make_dataset()
        arrays = {"x": made["x"], "y": made["y"], "x_published": made["x_test"], "y_published": made["y_test"]}
        for name, (seed, examples) in GENERATED.items():
            changes = {"seed": seed, "num_samples": examples, "train_split": 1.0}
            made = mnist1d.make_dataset(mnist1d.ObjectView(mnist1d.get_dataset_args(as_dict=True) | changes))
            arrays |= {f"x_{name}": made["x"], f"y_{name}": made["y"]}
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    for name, expected in SHA256.items():
        arrays[name] = np.ascontiguousarray(arrays[name], np.float32)
        if (found := sha256(arrays[name].data)) != expected:
            raise UserError(f"mnist1d made {name} with sha256 {found}, not {expected}: install the locked versions")

    def split(suffix: str) -> Split:
        return Split(arrays[f"x{suffix}"][:, None], arrays[f"y{suffix}"].astype(np.int64))

    train, test, validation, published = map(split, ("", "_test", "_validation", "_published"))
    return Raw(train, test, validation, published, tuple("0123456789"), standardise=False)
