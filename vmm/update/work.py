"""The jobs: check, download, apply, roll back, settle. Each runs in a thread, one at a time, and leaves its records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from vmm.clock import rfc3339
from vmm.errors import Conflict, Unavailable, UserError
from vmm.update import choice, clock, install, slots, stick, targets, trust
from vmm.update.environment import Enter, Environment
from vmm.update.errors import Refused, named_errors
from vmm.update.esp import BootEntry, mark_bad, mark_good, started_by
from vmm.update.job import Job
from vmm.update.records import Caller, Type
from vmm.update.rotation import Rotation
from vmm.update.settle import Verdict, judge, newest_usable
from vmm.update.source import DirectorySource, HttpSource, Source
from vmm.update.staging import Origin
from vmm.update.state import AskedSource, GateFailure, SourceName, Waiting
from vmm.update.types import Failed, Release, version_key


class Work:
    """The jobs of this host."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._keys = Rotation(environment)

    def check(
        self, job: Job, caller: Caller, enter: Enter, *, source: AskedSource | None, override_expiry: bool
    ) -> None:
        """See what the repository offers; of a stick, the bundle on it is imported first. Raises: UserError."""
        enter("checking")
        store = self._env.store
        if source == "stick":
            self._import_stick(job, caller)
        name = "bundle" if source == "stick" else source or self._usual_source()
        asked = {"override_expiry": override_expiry}
        with self._recorded("update.check", job, caller, asked) as extra, self._source(name, job) as origin:
            trusted = self._refresh(origin, override_expiry, extra)
            chosen = choice.choose(trusted.targets, _loader(origin, trusted), self._host(), trusted.moment.time)
            extra["passed_over"] = [error.message for _, error in chosen.passed_over][:16]
            version = chosen.release.version if chosen.release else ""
            extra["version"] = version
            store.change(checked=rfc3339(self._env.now()), available=version, source=name, overridden=override_expiry)
            if chosen.release is None:
                _raise_if_attacked(chosen.passed_over)

    def download(
        self, job: Job, caller: Caller, enter: Enter, *, version: str, retry_failed: bool, override_expiry: bool
    ) -> None:
        """Bring a release into staging: the one named, or the newest for this host. Raises: UserError."""
        enter("checking")
        env = self._env
        self._refuse_if_waiting()
        overridden = override_expiry or env.store.state.overridden
        asked = {"asked": version, "retry_failed": retry_failed, "override_expiry": overridden}
        name = env.store.state.source or self._usual_source()
        with self._recorded("update.download", job, caller, asked) as extra, self._source(name, job) as origin:
            trusted = self._refresh(origin, overridden, extra)
            release = self._choose(version, retry_failed, origin, trusted)
            extra |= {"version": release.version, "epoch": release.epoch, "root_hash": release.root_hash}
            install.check_room(release, env.system, env.running.root_hash)
            enter("downloading")
            where = Origin(origin, trusted.targets, env.running.version, env.system.base)
            brought = env.staging.bring(release, where, job)
            extra["parts"] = [msgspec.to_builtins(part) for part in brought]

    def apply(self, job: Job, caller: Caller, enter: Enter) -> None:
        """Write the staged release to the other slot and make it the next to start. Raises: UserError."""
        env = self._env
        self._refuse_if_waiting()
        release = env.staging.staged()
        if release is None:
            raise Conflict("nothing is staged", hint="Download a release first.")
        extra = {
            "version": release.version,
            "epoch": release.epoch,
            "root_hash": release.root_hash,
            "parts": {name: part.sha384 for name, part in choice.parts(release)},
        }
        enter("staged")
        with self._recorded("update.apply", job, caller, extra) as extra:
            if version_key(release.version) <= version_key(env.running.version):
                raise Refused("version", f"{release.version} is not newer than the running {env.running.version}")
            choice.check_release(release, self._host())
            waiting = Waiting(release.version, release.epoch, release.root_hash, env.running.boot)

            known, change = env.store.state.keys, None

            def ready(uki: Path) -> None:
                nonlocal change
                change = self._keys.prepare(release, uki)

            def commit(begun: bool) -> None:
                if begun and change is not None:
                    self._keys.leave(change)
                env.store.change(installed=waiting if begun else None, keys=change if begun and change else known)

            done = install.install(release, env.staging, env.system, env.running.root_hash, job, enter, ready, commit)
            env.store.change(installed=msgspec.structs.replace(waiting, certain=True))
            if change is not None:
                extra["key"] = change.subject
            extra |= {"slot": done.slot, "signer": done.signer, "boot_entry": done.uki.name}
            env.staging.clear()

    def rollback(self, job: Job, caller: Caller, enter: Enter) -> None:
        """Have the boot loader take the older version from the next boot on. Raises: UserError."""
        enter("verifying")
        env = self._env
        with self._recorded("update.rollback", job, caller, {}) as extra:
            usable = newest_usable(env.system.entries())
            newest, older = self._two(usable)
            extra |= {"version": newest.version, "to": older.version}
            self._check_older(older, job)
            enter("finishing")
            waiting = env.store.state.installed
            reason = f"rolled back to {older.version} by {caller.actor.id}"
            # First remembered, then done: a kill between must not have the host take the version again by itself.
            env.store.fail(
                Failed(newest.version, reason, rfc3339(env.now())),
                installed=None if waiting and waiting.version == newest.version else waiting,
            )
            mark_bad(newest)
            self._keys.tidy()

    def settle(self) -> Verdict:
        """Judge the boot, once it can be judged; a second call finds nothing to do but to try the seals again.

        Raises: UserError.
        """
        env = self._env
        run = env.running
        with named_errors():
            entries = env.system.entries()
            verdict = judge(env.store.state, entries, run.version, run.root_hash, run.boot, env.store.gate_failure())
            if verdict.kind == "trial":
                env.store.note_trial(run.boot)
            elif verdict.kind == "blessed":
                self._record_blessing()
            elif verdict.kind == "nothing" and run.version in env.store.state.blessed and self._seals_are_due():
                self._renew_seals_again()
            elif verdict.kind == "failed":
                self._record_failure(verdict, entries)
            elif verdict.kind == "withdrawn":
                env.recorder.event(
                    "update.failed", verdict.version, failed=True, reason="interrupted before it could start", extra={}
                )
                keys = self._keys.pending
                env.store.change(installed=None, keys=None if keys and keys.version == verdict.version else keys)
        try:
            with named_errors():
                self._keys.go_on()
        except UserError as error:
            # No reason to give up a version that is kept: every start tries again.
            print(f"update: the change of keys: {error.message}", file=sys.stderr, flush=True)
        return verdict

    def bless(self) -> Verdict:
        """The running version has passed its gate: it is kept, and the floor rises to its epoch. Raises: UserError."""
        with named_errors():
            own = self._own_entry()
            if own is not None and not own.blessed:
                mark_good(own)
        return self.settle()

    def condemn(self, reason: str) -> Verdict:
        """The running version has failed its gate: it gets no further try. Raises: UserError."""
        env = self._env
        with named_errors():
            run = env.running
            env.store.note_gate_failure(GateFailure(run.version, run.boot, reason, rfc3339(env.now())))
            own = self._own_entry()
            if own is None or own.blessed:
                raise Conflict("the running version is not on trial")
            mark_bad(own)
        return Verdict("trial", env.running.version, reason)

    def _seals_are_due(self) -> bool:
        """Whether seals of an epoch that was left may be there, and the running system is not of such a one itself:
        an older system that somebody put back must not take the newer one's seals away.
        """
        return bool(self._env.store.state.seals_kept) and self._env.running.epoch >= self._env.floor.read()

    def _renew_seals(self) -> tuple[list[str], str]:
        """What was taken away, or why nothing was: a seal that stays is no reason not to raise the floor."""
        try:
            with named_errors():
                return self._env.system.renew_seals(), ""
        except UserError as error:
            return [], error.message

    def _renew_seals_again(self) -> None:
        """Once more what failed when the running version was blessed; on record is only what is new."""
        env = self._env
        removed, kept = self._renew_seals()
        if kept != env.store.state.seals_kept:
            extra = {"epoch": env.running.epoch, "seals_removed": removed}
            env.recorder.event("update.seals", env.running.version, failed=bool(kept), reason=kept, extra=extra)
            env.store.change(seals_kept=kept)

    def _own_entry(self) -> BootEntry | None:
        return started_by(self._env.system.entries(), self._env.running.root_hash)

    def _record_blessing(self) -> None:
        env, run = self._env, self._env.running
        extra: dict[str, Any] = {"epoch": run.epoch, "root_hash": run.root_hash}
        if 0 < env.floor.read() < run.epoch:
            # First remembered: once the floor has risen nothing else tells that old seals are left.
            env.store.change(seals_kept="interrupted")
        kept = env.store.state.seals_kept
        if self._seals_are_due():
            removed, kept = self._renew_seals()
            extra |= {"seals_removed": removed, "seals_kept": kept}
        env.floor.raise_to(run.epoch)
        env.recorder.event("update.bless", run.version, extra={**extra, "floor": env.floor.read()})
        env.store.bless(run.version, installed=None, seals_kept=kept)

    def _record_failure(self, verdict: Verdict, entries: list[BootEntry]) -> None:
        env = self._env
        # Nothing is tried again by itself: what is left of its tries goes too.
        for entry in entries:
            if entry.version == verdict.version and not entry.bad:
                mark_bad(entry)
        tried = env.store.state.installed
        extra = {
            "running": env.running.version,
            "root_hash": env.running.root_hash,
            "boots": list(tried.boots) if tried else [],
        }
        env.recorder.event("update.failed", verdict.version, failed=True, reason=verdict.reason, extra=extra)
        failed = Failed(verdict.version, verdict.reason, rfc3339(env.now()))
        env.store.fail(failed, installed=None)

    def _import_stick(self, job: Job, caller: Caller) -> None:
        """Take the bundle on the stick that is plugged in, as one that was uploaded. Raises: UserError."""
        env = self._env
        with named_errors():
            found = stick.only(env.system.sticks())
        with self._recorded("update.import", job, caller, {"device": found.name}) as extra:
            extra["bytes"] = stick.take(found, env.bundle, job)
            env.store.change(source="bundle", overridden=False)
        job.expect(0)

    def _usual_source(self) -> SourceName:
        return "repository" if self._env.configuration() else "bundle"

    @contextmanager
    def _source(self, name: SourceName, job: Job) -> Iterator[Source]:
        if name == "bundle":
            if not self._env.bundle.is_dir():
                raise Conflict("no bundle was imported, and no repository is configured")
            yield DirectorySource(self._env.bundle)
            return
        update = self._env.configuration()
        if update is None:
            raise Conflict("no repository is configured", hint="Set update.repository, or import a bundle.")
        ca, proxy = update.ca or "", update.proxy or ""
        with closing(HttpSource(update.repository, ca=ca, proxy=proxy, check=job.check)) as source:
            yield source

    def _refresh(self, source: Source, override: bool, extra: dict[str, Any]) -> trust.Trusted:
        env = self._env
        moment = clock.best(env.now(), env.running.built, env.store.state.seen)
        extra |= {"source": source.name, "time": moment.text, "time_source": moment.origin}
        trusted = trust.refresh(source, env.root_metadata(), env.folder / "metadata", moment, override_expiry=override)
        extra |= trusted.record
        if not any(role.expired for role in trusted.roles) and moment.seconds > env.store.state.seen:
            # Bounded by the metadata's own expiry, so a clock that runs ahead cannot poison it for long.
            env.store.change(seen=moment.seconds)
        return trusted

    def _choose(self, version: str, retry_failed: bool, origin: Source, trusted: trust.Trusted) -> Release:
        load, host = _loader(origin, trusted), self._host()
        if version:
            return choice.choose_version(trusted.targets, load, host, version, retry_failed=retry_failed)
        chosen = choice.choose(trusted.targets, load, host, trusted.moment.time)
        if chosen.release is None:
            _raise_if_attacked(chosen.passed_over)
            reasons = "; ".join(error.message for _, error in chosen.passed_over[:4])
            raise Conflict("there is no newer release for this host" + (f": {reasons}" if reasons else ""))
        return chosen.release

    def _host(self) -> choice.Host:
        env = self._env
        update = env.configuration()
        return choice.Host(
            version=env.running.version,
            epoch=env.running.epoch,
            floor=env.floor.read(),
            machine_id=env.running.machine_id,
            channel=update.channel if update else "stable",
            failed={failed.version: failed.reason for failed in env.store.state.failed},
        )

    def _refuse_if_waiting(self) -> None:
        waiting = self._env.store.state.installed
        if waiting and waiting.certain:
            raise Conflict(
                f"{waiting.version} is installed and waits for its reboot",
                hint="Restart the host, or take the installed version back by a rollback.",
            )

    def _two(self, usable: list[BootEntry]) -> tuple[BootEntry, BootEntry]:
        older = [entry for entry in usable[1:] if entry.blessed and entry.uki is not None]
        if not usable or not older:
            raise Refused("slots", "there is no other good version to go back to")
        return usable[0], older[0]

    def _check_older(self, older: BootEntry, job: Job) -> None:
        """Whether the version to go back to is above the floor and as whole as on its first day."""
        env = self._env
        assert older.uki is not None
        floor = env.floor.read()
        if older.uki.epoch < floor:
            raise Refused("epoch floor", f"{older.version} has epoch {older.uki.epoch}, below the floor of {floor}")
        if older.uki.root_hash == env.running.root_hash:
            return
        system = slots.find(env.system.table(), older.version)
        if system is None or not slots.belongs(system, older.uki.root_hash):
            raise Refused("slots", f"the slot of {older.version} is not complete")
        job.check()
        env.system.verify(env.system.device(system.root), env.system.device(system.verity), older.uki.root_hash)
        env.system.check_signer(older.path)

    @contextmanager
    def _recorded(self, type: Type, job: Job, caller: Caller, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Intent before, outcome after; what the body learns it adds to ``extra``. Raises: UserError only."""
        recorder = self._env.recorder
        request = recorder.intent(type, caller, extra)
        job.begun()
        found = dict(extra)
        failure: UserError | None = None
        try:
            with named_errors():
                yield found
        except UserError as error:
            failure = error
            raise
        except Exception as error:
            failure = Unavailable(f"an internal error: {type_name(error)}")
            raise
        finally:
            # A kill leaves the intent open; the audit daemon closes it as interrupted.
            if failure is not None:
                recorder.outcome(type, request, caller, str(found.get("version", "")), failure, found)
        recorder.outcome(type, request, caller, str(found.get("version", "")), None, found)


def type_name(error: Exception) -> str:
    """What an unexpected error is called in a record."""
    return type(error).__name__


def _loader(source: Source, trusted: trust.Trusted) -> Callable[[targets.Target], bytes]:
    return lambda target: targets.read(source, target, limit=targets.MOST_RELEASE_JSON)


def _raise_if_attacked(passed_over: tuple[tuple[str, Refused], ...]) -> None:
    """A newer version of an older epoch is nothing that an honest, current repository offers."""
    for _, error in passed_over:
        if error.layer in ("epoch", "epoch floor"):
            raise error
