"""What every store does, whichever database it has: tests for a fixture `database`."""

import threading
from collections import Counter

import pytest
from serving import add, new_job

from opensoraplan.serve.database import Database
from opensoraplan.serve.jobs import Failure, Job
from opensoraplan.serve.roster import Roster, Worker
from opensoraplan.serve.store import OtherRequestError, QueueFullError, Store, new_id

DIED = Failure("worker_died", "the worker died")


class StoreContract:
    @pytest.fixture
    def store(self, database: Database) -> Store:
        return Store(database)

    def claim(self, store: Store, worker: str = "w", lease: float = 60) -> Job:
        job = store.claim(worker, "builtin", lease=lease)
        assert job is not None
        return job

    def test_jobs_are_claimed_once_and_by_age(self, store: Store) -> None:
        ids = [add(store).id for _ in range(3)]
        jobs = [job for one in ids if (job := store.get(one)) is not None]
        assert store.places(jobs[1:]) == {ids[1]: 1, ids[2]: 2}
        assert store.claim("w", "another model", lease=60) is None
        assert [self.claim(store).id for _ in ids] == ids
        assert store.claim("w", "builtin", lease=60) is None
        assert store.counts() == {"in_progress": 3}

    def test_many_workers_claim_each_job_once(self, store: Store) -> None:
        ids = {add(store).id for _ in range(40)}
        claimed: list[str] = []

        def work(worker: str) -> None:
            while (job := store.claim(worker, "builtin", lease=60)) is not None:
                claimed.append(job.id)
                assert store.report(job, lease=60, step=1)
                assert store.complete(job, keep=0)

        threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = store.claim("last", "builtin", lease=60)  # a row that was locked is passed over
        while left is not None:
            claimed.append(left.id)
            left = store.claim("last", "builtin", lease=60)
        assert Counter(claimed) == Counter(ids)

    def test_progress_and_the_end(self, store: Store) -> None:
        add(store)
        job = self.claim(store)
        assert store.report(job, lease=60, step=3, progress=28, step_seconds=0.5)
        found = store.get(job.id)
        assert found is not None
        assert (found.status, found.step, found.progress, found.step_seconds) == ("in_progress", 3, 28, 0.5)
        assert store.complete(job, keep=100)
        found = store.get(job.id)
        assert found is not None
        assert (found.status, found.progress, found.worker) == ("completed", 100, None)
        assert found.completed_at is not None
        assert found.expires_at == pytest.approx(found.completed_at + 100)
        assert not store.report(job, lease=60, step=4)
        assert not store.complete(job, keep=0)
        totals = store.totals()
        assert (totals["completed"], totals["steps"], totals["within_60"]) == (1, 1, 1)

    def test_a_worker_that_lost_its_job_changes_nothing(self, store: Store) -> None:
        add(store)
        first = self.claim(store, "first", lease=-1)
        assert store.release_lapsed(DIED, max_tries=3, keep=0) == 1
        second = self.claim(store, "second")
        assert second.id == first.id
        assert not store.report(first, lease=60, step=1)
        assert not store.complete(first, keep=0)
        assert not store.fail(first, DIED, keep=0)
        store.give_back(first, None, max_tries=3, keep=0)
        found = store.get(first.id)
        assert found is not None
        assert (found.status, found.worker, found.tries) == ("in_progress", "second", 2)

    def test_a_job_fails_after_tries_without_progress(self, store: Store) -> None:
        made = add(store)
        for tries in range(1, 3):
            job = self.claim(store)
            assert job.tries == tries
            store.release(["w"], DIED, max_tries=3, keep=0)
        job = self.claim(store)
        store.report(job, lease=60, step=5, saved=True)  # it has moved on: counted anew
        for _ in range(3):
            store.release(["w"], DIED, max_tries=3, keep=0)
            self.claim(store)
        store.release(["w"], DIED, max_tries=3, keep=60)
        found = store.get(made.id)
        assert found is not None
        assert (found.status, found.error_code) == ("failed", "worker_died")
        assert found.error_message == "the worker died (3 workers in a row, at step 5)"
        assert found.expires_at is not None
        assert store.totals()["failed"] == 1
        assert store.totals()["retried"] == 5

    def test_stopping_is_no_try(self, store: Store) -> None:
        made = add(store)
        for _ in range(5):
            job = self.claim(store)
            assert job.tries == 1
            store.give_back(job, None, max_tries=1, keep=0)
        found = store.get(made.id)
        assert found is not None
        assert (found.status, found.tries, found.error_code) == ("queued", 0, None)

    def test_a_removed_job_is_lost_to_its_worker(self, store: Store) -> None:
        made = add(store, new_job("me"))
        job = self.claim(store)
        assert store.remove(made.id, "another") is None
        removed = store.remove(made.id, "me")
        assert removed is not None
        assert removed.status == "in_progress"
        assert not store.report(job, lease=60, step=1)
        assert store.get(made.id) is None
        assert store.totals()["cancelled"] == 1

    def test_a_full_queue(self, store: Store) -> None:
        add(store, most_queued=2)
        add(store, most_queued=2)
        with pytest.raises(QueueFullError):
            add(store, most_queued=2)
        self.claim(store)
        add(store, most_queued=2)

    def test_idempotency_keys(self, store: Store) -> None:
        first = add(store, new_job("me", idempotency_key="k", body_digest="a"))
        again = add(store, new_job("me", idempotency_key="k", body_digest="a"), most_queued=1)
        other = add(store, new_job("you", idempotency_key="k", body_digest="b"))
        assert again.id == first.id != other.id
        with pytest.raises(OtherRequestError):
            add(store, new_job("me", idempotency_key="k", body_digest="b"))

    def test_the_same_key_at_once_is_one_job(self, store: Store) -> None:
        made: list[str] = []
        new = new_job("me", idempotency_key="k", body_digest="a")
        barrier = threading.Barrier(8)

        def send() -> None:
            barrier.wait()
            made.append(add(store, new).id)

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 8
        assert len(set(made)) == 1

    def test_pages(self, store: Store) -> None:
        ids = [add(store, new_job("me")).id for _ in range(5)]
        add(store, new_job("another"))
        first, more = store.page("me", after=None, limit=2, order="desc")
        assert ([one.id for one in first], more) == (ids[:2:-1], True)
        rest, more = store.page("me", after=first[-1], limit=10, order="desc")
        assert ([one.id for one in rest], more) == (ids[2::-1], False)
        oldest, more = store.page("me", after=store.get(ids[0]), limit=1, order="asc")
        assert ([one.id for one in oldest], more) == ([ids[1]], True)

    def test_expiry(self, store: Store) -> None:
        add(store)
        add(store)
        store.complete(self.claim(store), keep=0)
        expired = self.claim(store)
        store.complete(expired, keep=-1)
        assert store.remove_expired() == [expired.id]
        assert store.remove_expired() == []
        assert store.counts() == {"completed": 1}
        assert store.known([expired.id, new_id()]) == set()

    def test_workers(self, store: Store, database: Database) -> None:
        roster = Roster(database)
        roster.join(Worker("a", "host-0", "cpu", "builtin", 7))
        roster.join(Worker("b", "host-1", "cpu", "builtin", 8))
        roster.tell("a", ready=1, facts={"device": "cpu"})
        (first,) = roster.workers("host-0")
        assert (first.id, first.ready, first.facts, first.pid) == ("a", True, {"device": "cpu"}, 7)
        assert roster.silent(60) == set()
        assert roster.silent(-60) == {"a", "b"}
        add(store)
        job = self.claim(store, "a", lease=-1)
        roster.beat("a", lease=60)
        assert store.release_lapsed(DIED, max_tries=3, keep=0) == 0
        assert store.report(job, lease=60)
        roster.leave(["a"])
        assert [one.id for one in roster.workers()] == ["b"]
