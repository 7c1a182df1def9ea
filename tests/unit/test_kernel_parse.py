"""The text of the kernel's audit records, also of hostile ones, and how records become events."""

from __future__ import annotations

import random

from vmm.kernel.gaps import Gaps
from vmm.kernel.joining import Event, Joiner
from vmm.kernel.judge import Judge, Machines
from vmm.kernel.libvirt import Gatherer
from vmm.kernel.parse import MOST_TEXT, Line, number, parse, text

AVC = (
    b'audit(1700000000.123:456): apparmor="DENIED" operation="open" class="file" '
    b'profile="libvirt-5f1c7a9e-8a1b-4b7c-9f3e-0d2c4b6a8e10" name="/etc/shadow" pid=4242 comm="qemu-system-x86" '
    b'requested_mask="r" denied_mask="r" fsuid=70001 ouid=0'
)
VIRT = (
    b"audit(1700000001.000:460): pid=900 uid=0 auid=4294967295 ses=4294967295 subj=libvirtd msg='virt=kvm op=stop "
    b'reason=destroyed vm="vm1" uuid=5f1c7a9e-8a1b-4b7c-9f3e-0d2c4b6a8e10 vm-pid=0 exe="/usr/sbin/libvirtd" '
    b"hostname=? addr=? terminal=? res=success'"
)


def parsed(raw: bytes) -> Line:
    line = parse(raw)
    assert line is not None
    return line


def test_a_record_of_the_kernels_is_read() -> None:
    line = parsed(AVC + b"\0")
    assert (line.time, line.serial, line.said) == (1700000000123, 456, {})
    assert line.fields["apparmor"] == '"DENIED"' and line.fields["fsuid"] == "70001"
    assert text(line.fields["name"]) == "/etc/shadow"


def test_what_a_program_says_is_kept_apart_from_what_the_kernel_says() -> None:
    line = parsed(VIRT)
    assert line.fields["uid"] == "0" and "uuid" not in line.fields
    assert line.said["op"] == "stop" and line.said["res"] == "success"
    forged = parsed(b"audit(1.000:2): pid=900 uid=905 subj=x msg='op=start uid=0 subj=libvirtd msg='uid=0' uid=0'")
    assert forged.fields["uid"] == "905" and forged.fields["subj"] == "x"


def test_the_first_of_a_name_counts() -> None:
    """So nobody's value, should the kernel ever leave it unquoted, overrules what stands before it."""
    assert parsed(b'audit(1.000:2): uid=70001 comm="x" uid=0').fields["uid"] == "70001"
    # A value in quotes is one value, whatever is in it.
    assert parsed(b'audit(1.000:2): comm="a uid=0 b" uid=70001').fields["uid"] == "70001"


def test_texts_of_strangers_are_decoded_made_printable_and_cut() -> None:
    assert text('"qemu"') == "qemu"
    assert text(b'a "b" c\n'.hex().upper()) == 'a "b" c\\x0a'
    assert text("1B5B324A") == "\\x1b[2J", "no terminal is told anything"
    assert text(b"\xff\xfe".hex()) == "\\xff\\xfe"
    assert text("\u202egnp.exe".encode().hex()) == "\\u202egnp.exe"
    assert (text(None), text("(null)"), text("?")) == ("", "", "")
    assert len(text((b"\n" * 9000).hex())) <= MOST_TEXT + 1
    assert len(text('"' + "x" * 9000)) == MOST_TEXT + 1
    assert (number("70001"), number("ffffff9c", 16), number("x"), number(None)) == (70001, 0xFFFFFF9C, None, None)
    assert number("9" * 30) is None and number("9" * 9000) is None


def test_what_is_no_record_is_none() -> None:
    for raw in (b"", b"\0", b"audit", b"audit(1.2:3): x=1", b"audit(1.000:): x=1", b"audit(1.000:99999999999999999999)",
                b"x" + AVC, b"audit(9999999999999.000:1): a=1"):  # fmt: skip
        assert parse(raw) is None, raw


def test_nothing_that_comes_raises() -> None:
    """Any bytes, and damaged records, go through all that becomes of records."""
    source = random.Random(4)
    types = (1300, 1302, 1305, 1307, 1309, 1320, 1324, 1326, 1330, 1332, 1333, 1400, 1701, 2500, 2501, 2502)
    words = (
        *(b'name="', b"key=", b'"module"', b"exit=", b"-13 ", b"msg='", b"'", b"=", b'apparmor="DENIED" ', b"\xff\0"),
        *(b"uid=70001 ", b"subj=libvirt-", b"vm-ctx=+70001:kvm ", b"uuid=", b"a0=", b"success=no ", b"mark=0x"),
        *(b'key="exec" ', b'key="open" ', b'key="time" ', b"9" * 5000),
    )
    machines = Machines()
    judge, gatherer, joiner = Judge(machines, set), Gatherer(machines), Joiner()
    events: list[Event] = []
    for turn in range(20_000):
        match turn % 3:
            case 0:
                raw = source.randbytes(source.randrange(200))
            case 1:
                raw = bytearray(source.choice((AVC, VIRT)))
                for _ in range(source.randrange(1, 6)):
                    raw[source.randrange(len(raw))] = source.randrange(256)
                raw = bytes(raw)
            case _:
                raw = b"audit(1.000:2): " + b"".join(source.choices(words, k=source.randrange(12)))
        if (line := parse(raw)) is not None:
            events += joiner.add(source.choice(types), line._replace(serial=source.randrange(300)), float(turn))
    events += joiner.ripe(1e9)
    for event in events:
        judge.judge(event)
        gatherer.take(event)
    assert len(events) > 500 and len(joiner) == 0


def line(serial: int) -> Line:
    return Line(1000, serial, {}, {})


def test_records_of_one_serial_are_one_event() -> None:
    joiner = Joiner()
    assert not list(joiner.add(1400, line(1), 0.0)) and not list(joiner.add(1300, line(2), 0.0))
    assert not list(joiner.add(1300, line(1), 0.1)) and not list(joiner.add(1302, line(2), 0.1))
    (first,) = joiner.add(1320, line(1), 0.2)
    assert [type_ for type_, _ in first.records] == [1400, 1300]
    assert not list(joiner.add(1320, line(9), 0.2)), "an end without a beginning"
    assert not list(joiner.ripe(1.9))
    (second,) = joiner.ripe(2.0)
    assert (second.serial, [type_ for type_, _ in second.records]) == (2, [1300, 1302])


def test_open_events_and_their_records_are_bounded() -> None:
    joiner = Joiner()
    out = [event for serial in range(2000) for event in joiner.add(1300, line(serial), 0.0)]
    assert len(joiner) == 512 and [event.serial for event in out] == list(range(2000 - 512))
    for _ in range(1000):
        assert not list(joiner.add(1302, line(1999), 0.0))
    assert len(list(joiner.ripe(9.0))[-1].records) == 32


def test_missing_numbers_are_counted_once_they_do_not_come() -> None:
    gaps = Gaps()
    for serial in (100, 101, 104, 103):
        gaps.saw(serial, 0.0)
    assert gaps.waiting and gaps.lost(4.9) == 0
    assert (gaps.lost(5.0), gaps.lost(9.0), gaps.waiting, gaps.newest) == (1, 0, False, 104)
    # The run before had dealt with all up to 104.
    gaps = Gaps(104)
    gaps.saw(107, 0.0)
    assert gaps.lost(5.0) == 2
    gaps.saw(10**12, 6.0)
    assert gaps.lost(6.0) + gaps.lost(11.0) == 10**12 - 108
