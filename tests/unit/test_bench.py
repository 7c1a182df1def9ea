"""The benchmark's pure parts: what it reads from others' output, and what it makes of figures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests.bench import audit
from tests.bench.figures import Figure, document, median, ratio, table
from tests.bench.guests import order, plain_arguments
from tests.bench.timeline import Boot, Watch, boot_figures, seconds, startup
from tests.bench.updates import ALTER
from tests.harness.waiting import poll

# -- what systemd and the serial console say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "expected"), [("633ms", 0.633), ("1min 12.345s", 72.345), ("2h 3min 4s", 7384), ("18us", 18e-6)]
)
def test_time_spans_are_read_as_systemd_writes_them(span: str, expected: float) -> None:
    assert seconds(span) == pytest.approx(expected)


@pytest.mark.parametrize("span", ["", "12", "1 s", "soon"])
def test_what_is_no_time_span_is_refused(span: str) -> None:
    with pytest.raises(ValueError, match="not a time span"):
        seconds(span)


def test_the_phases_of_a_start_are_found_in_systemds_line() -> None:
    text = (
        "Startup finished in 1min 2.5s (firmware) + 3.2s (loader) + 633ms (kernel) + 14.9s (initrd) + 20.3s (userspace)"
        " = 1min 41.5s \nmulti-user.target reached after 20.1s in userspace.\n"
    )
    expected = {"firmware": 62.5, "loader": 3.2, "kernel": 0.633, "initrd": 14.9, "userspace": 20.3}
    assert startup(text) == pytest.approx(expected)


def test_an_unfinished_start_has_no_phases() -> None:
    with pytest.raises(ValueError, match="no phases"):
        startup("Bootup is not yet finished.")


def test_markers_count_from_where_the_file_ended_and_the_last_appearance_counts(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"loader kernel\n")
    start = time.monotonic()
    with Watch(log, {"loader": b"loader", "kernel": b"kernel"}) as watch, log.open("ab", buffering=0) as file:
        file.write(b"load")
        file.write(b"er\n")
        poll(lambda: watch.seen, 10, "the marker is seen")
        first = watch.seen["loader"]
        file.write(b"reset\nloader\n")
        poll(lambda: watch.seen["loader"] > first, 10, "the marker is seen again")
    assert list(watch.since(start)) == ["loader"]
    assert watch.since(start)["loader"] == watch.seen["loader"] - start


def test_starts_show_the_medians_of_the_stages_that_were_seen() -> None:
    boots = [
        Boot({"kernel starts": 9.0}, 30.0, 40.0, {"kernel": 2.0}),
        Boot({"kernel starts": 11.0}, 32.0, 50.0, {"kernel": 4.0, "userspace": 12.0}),
    ]
    assert [(f.name, f.value) for f in boot_figures("start", "API ready", boots)] == [
        ("at kernel starts", 10.0),
        ("at API ready", 31.0),
        ("processor time until API ready", 45.0),
        ("kernel (systemd)", 3.0),
        ("userspace (systemd)", 12.0),
    ]


# -- figures -----------------------------------------------------------------------------------------------------------

FIGURES = [
    Figure("sizes", "UKI", 37.29, "MiB", 40.0),
    Figure("start", "share", 0.71, "×", 0.6, note="Of the second start."),
    Figure("start", "first", 61.0, "s", note="Of the second start."),
    Figure("audit", "records", 5001.0, "/s", 5000.0, least=True),
]


def test_the_table_shows_groups_goals_verdicts_and_each_note_once() -> None:
    lines = [line.split() for line in table(FIGURES).splitlines()]
    assert ["SIZES"] in lines
    assert ["UKI", "37.3", "MiB", "≤", "40", "MiB", "met"] in lines
    assert ["share", "[1]", "0.71", "×", "≤", "0.6", "×", "MISSED"] in lines
    assert ["first", "[1]", "61.0", "s"] in lines
    assert ["records", "5001.0", "/s", "≥", "5000", "/s", "met"] in lines
    assert lines.count(["[1]", "Of", "the", "second", "start."]) == 1


def test_the_document_says_which_goals_were_met() -> None:
    written = json.loads(json.dumps(document({"cores": 2}, [*FIGURES, median("guest", "API", [3.0, 1.0, 2.0])])))
    assert written["machine"] == {"cores": 2}
    assert [figure.get("met") for figure in written["figures"]] == [True, False, None, True, None]
    assert written["figures"][4] == {
        "group": "guest", "name": "API", "value": 2.0, "unit": "s", "samples": [3.0, 1.0, 2.0],
    }  # fmt: skip


def test_a_ratio_is_of_medians() -> None:
    ours, theirs = median("guest", "API", [1.0, 9.0, 3.0]), median("guest", "libvirt", [2.0, 2.0])
    assert ratio("guest", "API : libvirt", ours, theirs, goal=1.1) == Figure("guest", "API : libvirt", 1.5, "×", 1.1)


def test_auditing_is_measured_without_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_SECONDS", 0.05)
    figures = {figure.name: figure for figure in audit.measure(tmp_path)}
    assert all(figure.value > 0 for figure in figures.values())
    goal = figures["durable records, through its socket"].goal
    assert goal == min(5000, 0.5 * figures["durable records, as the disk allows"].value)
    assert 300 < figures["size of a record"].value < 2000


# -- ways of starting a guest ------------------------------------------------------------------------------------------


def test_every_way_of_starting_comes_first_in_turn() -> None:
    assert [order(repetition)[0] for repetition in range(4)] == ["api", "libvirt", "qemu", "api"]
    assert all(sorted(order(repetition)) == ["api", "libvirt", "qemu"] for repetition in range(3))


def test_plain_qemu_opens_itself_what_libvirt_hands_over() -> None:
    tap = {"type": "tap", "fd": "30", "vhost": True, "vhostfd": "32", "id": "hostnet0"}
    disk = '{"driver":"file","filename":"/var/lib/holdfast/core/volumes/v.raw","node-name":"libvirt-1-storage"}'
    ram = '{"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456}'
    given = [
        "/usr/bin/qemu-system-x86_64", "-S",
        "-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/gone/master-key.aes"}',
        "-object", ram,
        "-object", "rng-random,id=objrng0,filename=/dev/urandom",
        "-add-fd", "set=0,fd=28",
        "-chardev", "socket,id=charmonitor,fd=29,server=on,wait=off",
        "-chardev", "pty,id=charserial0",
        "-blockdev", disk,
        "-netdev", json.dumps(tap),
        "-sandbox", "on,obsolete=deny",
    ]  # fmt: skip
    assert plain_arguments(given) == [
        "/usr/bin/qemu-system-x86_64", "-S",
        "-object", ram,
        "-object", "rng-random,id=objrng0,filename=/dev/urandom",
        "-chardev", "socket,id=charmonitor,path={monitor},server=on,wait=off",
        "-chardev", "pty,id=charserial0",
        "-blockdev", disk,
        "-netdev", json.dumps({"type": "tap", "vhost": True, "id": "hostnet0", "ifname": "bench-hostnet0",
                               "script": "no", "downscript": "no"}),
        "-sandbox", "on,obsolete=deny",
    ]  # fmt: skip


# -- a package that was changed ----------------------------------------------------------------------------------------


def test_all_code_of_a_package_is_changed_and_it_is_still_a_library(tmp_path: Path) -> None:
    folder = Path("usr/lib/x86_64-linux-gnu")
    (tmp_path / folder).mkdir(parents=True)
    for name in ("libcrypto.so.3", "libssl.so.3"):
        (tmp_path / folder / name).write_bytes(Path("/", folder, name).read_bytes())
    exec(ALTER, {"ROOT": tmp_path})  # noqa: S102 - as image/finalize does
    for name in ("libcrypto.so.3", "libssl.so.3"):
        with Path("/", folder, name).open("rb") as before, (tmp_path / folder / name).open("rb") as after:
            sections = zip(ELFFile(before).iter_sections(), ELFFile(after).iter_sections(), strict=True)
            for old, new in sections:
                same = old.header == new.header and old.data() == new.data()
                assert same != (old.name in (".text", ".init", ".fini", ".plt", ".plt.got", ".plt.sec")), old.name
