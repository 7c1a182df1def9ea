"""Compose the screen's text. Nothing that came from outside can steer the terminal."""

from __future__ import annotations

from vmm.config.types import Configuration
from vmm.console.facts import Facts, Health

WIDTH = 78
API_PORT = 8443
_RULE = "-" * WIDTH


def compose(facts: Facts) -> str:
    """The whole screen as lines of printable text."""
    lines = [_RULE]
    if facts.configuration is not None and facts.configuration.banner:
        lines += [*plain(facts.configuration.banner, keep_lines=True).split("\n"), _RULE]
    slot = plain(facts.slot).upper() or "?"
    lines.append(f"Holdfast {plain(facts.version)} (slot {slot})")
    if facts.configuration is not None:
        lines += _configured(facts.configuration, facts)
    if facts.failure is not None:
        title = "NOT CONFIGURED" if facts.configuration is None else "CONFIGURATION PROBLEM"
        source = f" (from {plain(facts.failure.source)})" if facts.failure.source else ""
        lines += ["", f"{title}: {plain(facts.failure.message)}{source}"]
        if facts.failure.hint:
            lines.append(f"  {plain(facts.failure.hint)}")
    elif facts.configuration is None:
        lines += ["", "The configuration is not applied yet."]
    if facts.update is not None:
        lines += ["", f"UPDATE FAILED: {plain(facts.update.version)}: {plain(facts.update.reason)}"]
    lines += [
        "",
        _health(facts.health),
        "",
        "There is no login here: use the `holdfast` command from another computer.",
        _RULE,
    ]
    return "\n".join(lines) + "\n"


def plain(text: str, *, keep_lines: bool = False) -> str:
    """Text with every control and other unprintable character taken out; line ends become blanks or stay."""
    lines = ("".join(c for c in line if c.isprintable()) for line in text.replace("\r\n", "\n").split("\n"))
    return ("\n" if keep_lines else " ").join(lines)


def _configured(configuration: Configuration, facts: Facts) -> list[str]:
    management = plain(configuration.management.interface)
    addresses = [plain(address) for address in facts.addresses]
    urls = [f"https://[{a}]:{API_PORT}" if ":" in a else f"https://{a}:{API_PORT}" for a in addresses]
    networks = [f"{plain(n.name)} ({plain(n.interface)})" for n in configuration.operational]
    lines = [
        f"Host:        {plain(configuration.hostname)}",
        f"Management:  {', '.join(addresses) or 'no address yet'} on {management}",
        f"API:         {' '.join(urls) or 'no address yet'}",
    ]
    if facts.fingerprint:
        pairs = [facts.fingerprint[i : i + 2].upper() for i in range(0, len(facts.fingerprint), 2)]
        # All 95 characters do not fit a line; both halves together are what `holdfast remote add` shows.
        lines += [f"Certificate: {':'.join(pairs[:16])}:", f"  (SHA-256)  {':'.join(pairs[16:])}"]
    else:
        lines.append("Certificate: not made yet")
    return [*lines, f"Operational: {', '.join(networks) or 'none'}"]


def _health(health: Health | None) -> str:
    if health is None:
        return "Health:      not known yet"
    bad = [f"\n  {plain(check.name)}: {plain(check.detail)}" for check in health.checks if not check.ok]
    return f"Health:      {plain(health.status)}" + "".join(bad)
