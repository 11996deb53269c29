"""What GRUB chooses, by its own rules."""

import pytest

from cos_console.host.boot import STOCK_MENU, Bootable, MenuEntry, outlook, resolve_entry
from cos_console.model.machine import SlotName

A, P, R = SlotName.ACTIVE, SlotName.PASSIVE, SlotName.RECOVERY
SOUND = Bootable(True, True)
ALL = {A: SOUND, P: SOUND, R: SOUND}


def test_without_variables_the_first_entry_boots_and_the_rest_is_fallback():
    found = outlook(STOCK_MENU, {}, ALL)
    assert (found.next, found.after, found.if_fails) == (A, A, (P, R))


@pytest.mark.parametrize(
    ("value", "slot"), [("fallback", P), ("1", P), ("recovery", R), ("nonsense", A), ("9", A)]
)
def test_saved_entry_is_an_id_or_an_index_and_an_unknown_one_is_the_first(value, slot):
    assert outlook(STOCK_MENU, {"saved_entry": value}, ALL).next is slot


def test_saved_entry_may_be_a_title():
    menu = (MenuEntry("cos", "cOS", A), MenuEntry("fallback", "cOS (fallback)", P))
    entry = resolve_entry(menu, "cOS (fallback)")
    assert entry is not None
    assert entry.slot is P


def test_next_entry_counts_once():
    found = outlook(STOCK_MENU, {"next_entry": "fallback"}, ALL)
    assert (found.next, found.after) == (P, A)
    found = outlook(STOCK_MENU, {"next_entry": "cos", "saved_entry": "fallback"}, ALL)
    assert (found.next, found.after) == (A, P)


def test_a_slot_that_grub_cannot_load_falls_back():
    found = outlook(STOCK_MENU, {}, {**ALL, A: Bootable(False, False)})
    assert (found.chosen, found.next, found.if_fails) == (A, P, (R,))
    assert "falls back to passive" in found.explained


def test_a_slot_whose_root_is_not_found_stops_the_boot_because_a_kernel_ran():
    found = outlook(STOCK_MENU, {}, {**ALL, A: Bootable(True, False)})
    assert found.next is None
    assert "root will not be found" in found.explained


def test_default_fallback_of_the_environment_replaces_the_stock_order():
    found = outlook(STOCK_MENU, {"default_fallback": "2"}, {**ALL, A: Bootable(False, False)})
    assert found.next is R


def test_a_grub_that_reads_no_environment_ignores_it():
    found = outlook(STOCK_MENU, {"saved_entry": "fallback"}, ALL, reads_environment=False)
    assert found.next is A
    assert not found.reads_environment


def test_nothing_that_loads_means_nothing_boots():
    assert outlook(STOCK_MENU, {}, {}).next is None
