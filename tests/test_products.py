import pytest
import torch

from pyro_pixels.guides import products


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    if products.PACKED is None:
        pytest.skip("this torch has no MKL")
    monkeypatch.setattr(products, "PACK_FROM", 1)


def check(W: torch.Tensor, n: int, n_rows: int) -> None:
    x, to = torch.randn(n, W.shape[0], dtype=W.dtype), torch.randn(n, W.shape[1], dtype=W.dtype)
    wanted = to.double() + x.double() @ W.double()
    products.accumulator(W, n_rows)(to, x)
    torch.testing.assert_close(to.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_rows", [0, 1, 3, 60])
@pytest.mark.parametrize("n", [0, 1, 3, 60])
@pytest.mark.parametrize(("i", "j"), [(1, 1), (5, 7), (130, 70)])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_products_are_sums_of_products(packing, i, j, n, n_rows, transposed):
    check(torch.randn(j, i).mT if transposed else torch.randn(i, j), n, n_rows)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_matrix(packing, transposed):
    """As the recursion uses it: the first half of the columns."""
    part = torch.randn(64, 64)[:, :32]
    check(part.mT if transposed else part, 20, 20)


def test_small_matrices_and_other_types_are_not_packed():
    assert not products.packs(torch.zeros(products.PACK_FROM - 1, 1))
    assert not products.packs(torch.zeros(products.PACK_FROM, 1, dtype=torch.float64))
    assert products.packs(torch.zeros(products.PACK_FROM, 1)) == (products.PACKED is not None)
    check(torch.randn(9, 7, dtype=torch.float64), 4, 4)
