"""The images of each batch: rounds, epochs, buckets, processes, repeats."""

from collections import Counter

import pytest

from reslora.images.data.plan import Draw, Plan
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.generators import shuffled

SIZES = (Size(64, 64), Size(64, 96), Size(96, 64))


def source(*bucket: int, repeats: int = 1, held_out: tuple[int, ...] = ()) -> Source:
    """Return a source whose images are in these buckets."""
    train = tuple(index for index in range(len(bucket)) if index not in held_out)
    return Source(None, None, train, held_out, tuple(SIZES[number] for number in bucket), repeats=repeats)


MIXED = source(*[0] * 7, *[1] * 3, *[2] * 1)
FOLDERS = [source(*[0] * 4), source(*[0] * 2, *[1] * 3, repeats=2), source(*[2] * 4)]  # the last one: 0 in another size


def images(draws: list[Draw]) -> list[int]:
    return [draw.image for draw in draws]


@pytest.mark.parametrize("per_forward", [2, 5])
def test_one_bucket_is_round_after_round(per_forward):
    """Sample p is at position p of the concatenated rounds: images that fill up a batch are not used twice."""
    plan, count = Plan([source(*[0] * 5)], per_forward, seed=3), 5
    found = [draw for number in range(12) for draw in plan.forward(number)]
    for position, draw in enumerate(found):
        assert draw == Draw(0, shuffled(count, 3, "order", position // count)[position % count], SIZES[0], position)


def test_each_bucket_has_an_order_of_its_own_and_so_have_forwards():
    """The order is the same in every version, so that runs of earlier versions can be resumed."""
    plan = Plan([source(*[0] * 8, *[1] * 8)], 1, seed=3)
    uses_per_epoch = [plan.forward(number)[0] for number in range(16)]
    orders = [[draw.image % 8 for draw in uses_per_epoch if draw.size == size] for size in SIZES[:2]]
    assert orders == [shuffled(8, 3, "order", 0), shuffled(8, 3, "order", 1, 0)] and orders[0] != orders[1]
    assert [draw.size for draw in uses_per_epoch] == [SIZES[place // 8] for place in shuffled(16, 3, "order", -1, 0)]


@pytest.mark.parametrize("per_forward", [1, 4])
def test_no_forward_mixes_sizes_and_every_epoch_meets_every_image(per_forward):
    plan = Plan([MIXED], per_forward, seed=1)
    epoch = plan.forwards_per_epoch
    assert epoch == sum(-(-count // per_forward) for count in (7, 3, 1))
    for first in range(0, 5 * epoch, epoch):
        forwards = [plan.forward(number) for number in range(first, first + epoch)]
        assert all(len({draw.size for draw in forward}) == 1 for forward in forwards)
        assert {draw.image for forward in forwards for draw in forward} == set(range(11))
        uses_per_epoch = Counter(image for forward in forwards for image in images(forward))
        if per_forward == 1:
            assert set(uses_per_epoch.values()) == {1}
    orders = [[plan.forward(e * epoch + n)[0].size for n in range(epoch)] for e in range(4)]
    assert len(set(map(tuple, orders))) > 1 or epoch == 3


def test_several_folders_and_resolutions_are_met_as_often_as_they_repeat_and_never_mixed():
    plan = Plan(FOLDERS, 2, seed=4)
    forwards = [plan.forward(number) for number in range(plan.forwards_per_epoch)]
    assert all(len({draw.size for draw in forward}) == 1 for forward in forwards)
    uses_per_epoch = Counter((draw.source, draw.image) for forward in forwards for draw in forward)
    assert uses_per_epoch.keys() == {
        (number, image) for number, count in enumerate((4, 5, 4)) for image in range(count)
    }
    assert any(len({draw.source for draw in forward}) > 1 for forward in forwards)


@pytest.mark.parametrize("sources", [[source(*[0] * 7)], [MIXED], FOLDERS])
def test_n_processes_read_what_one_reads_with_n_times_the_batch(sources):
    """A plan contains the samples of all processes; its order and sizes do not depend on their number."""
    together = Plan(sources, 6, seed=0)
    again = Plan(sources, 6, seed=0)
    for number in (40, 3, 17, 3):  # in any order: nothing is remembered
        assert together.forward(number) == again.forward(number)
        assert [draw.position for draw in together.forward(number)] == list(range(6 * number, 6 * number + 6))


def test_held_out_images_are_never_read_and_repeats_are_met_as_often():
    plan = Plan([source(*[0] * 4, held_out=(2,)), source(*[0] * 2, repeats=3)], 3, seed=0)
    uses_per_epoch = Counter((draw.source, draw.image) for number in range(3) for draw in plan.forward(number))
    assert uses_per_epoch == {(0, 0): 1, (0, 1): 1, (0, 3): 1, (1, 0): 3, (1, 1): 3}


@pytest.mark.parametrize(("per_forward", "accumulation", "updates"), [(16, 1, 1), (2, 1, 7), (2, 4, 2), (1, 100, 1)])
def test_updates_of_an_epoch(per_forward, accumulation, updates):
    assert Plan([source(*[0] * 13)], per_forward, seed=0).updates_per_epoch(accumulation) == updates


def test_another_seed_is_another_order():
    plans = [Plan([MIXED], 1, seed) for seed in range(4)]
    orders = {tuple(image for n in range(11) for image in images(plan.forward(n))) for plan in plans}
    assert len(orders) == 4
