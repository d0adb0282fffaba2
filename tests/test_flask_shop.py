"""The shop of examples/flask_shop, started with the two commands that the README gives."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import databases
import processes
import pytest
import requests
from waiting import eventually

SHOP = processes.ROOT / "examples" / "flask_shop"
ORDER = {"customer": "ann@example.com", "item": "Notebook", "quantity": "2"}


class Shop:
    """A shop that takes orders, in a folder of its own."""

    def __init__(self, folder: Path, database_url: str, address: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.address = address

    def page(self) -> str:
        return requests.get(self.address, timeout=30).text

    def order(self, **changes: str) -> requests.Response:
        return requests.post(f"{self.address}/orders", {**ORDER, **changes}, timeout=30)

    def count(self, what: str) -> int:
        with databases.administration(self.database_url) as cursor:
            cursor.execute(f"SELECT count(*) FROM {what}")
            (count,) = cursor.fetchone() or (0,)
            return int(count)


@contextlib.contextmanager
def opened(folder: Path, database_url: str) -> Iterator[Shop]:
    """A shop in a copy of its own, so that nothing is written in the checkout."""
    copy = shutil.copytree(SHOP, folder / "shop", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    port = processes.free_port()
    environment = {"FLASK_RUN_PORT": str(port)}
    with processes.start("flask", "run", folder=copy, database_url=database_url, environment=environment) as server:
        server.wait_for_line("Running on ")
        yield Shop(copy, database_url, f"http://127.0.0.1:{port}")


@pytest.fixture
def shop(tmp_path: Path, empty_database_url: str) -> Iterator[Shop]:
    with opened(tmp_path, empty_database_url) as shop:
        yield shop


@pytest.fixture(scope="module")
def order_desk(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop that several tests share, none of which leaves anything behind."""
    with databases.fresh(server_url) as url, opened(tmp_path_factory.mktemp("desk"), url) as shop:
        yield shop


def test_order_posted_in_one_process_is_confirmed_by_the_other(shop: Shop) -> None:
    with processes.runner(shop.folder, shop.database_url, "--pool", "50"):
        assert shop.order().status_code == 200
        eventually(lambda: shop.count("shop_orders WHERE confirmed_at IS NOT NULL") == 1, "no confirmed order")
        eventually(lambda: shop.count("background_jobs") == 0, "the job is still there")
    assert "Thank you for ordering 2 × Notebook." in shop.page()


def test_order_waits_for_a_runner_that_comes_later(shop: Shop) -> None:
    page = shop.order().text
    assert '<td class="waiting">waiting</td>' in page
    processes.run("greenjobs", "run", "--until-empty", folder=shop.folder, database_url=shop.database_url)
    assert '<td class="waiting">waiting</td>' not in shop.page()


def test_confirmation_that_runs_twice_sends_one_mail(shop: Shop) -> None:
    """As it may after the death of a runner."""
    shop.order()
    again = ("python", "-c", "import app; app.confirm_order.delay(1)")
    processes.run(*again, folder=shop.folder, database_url=shop.database_url)
    assert shop.count("background_jobs") == 2
    processes.run("greenjobs", "run", "--until-empty", folder=shop.folder, database_url=shop.database_url)
    assert shop.count("shop_mails") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"customer": ""},
        {"customer": "ann"},
        {"customer": "ann@example.com\r\nBcc: all@example.com"},
        {"customer": "a\0nn@example.com"},
        {"customer": f"{'a' * 200}@example.com"},
        {"item": "Elephant"},
        {"quantity": ""},
        {"quantity": "0"},
        {"quantity": "-1"},
        {"quantity": "101"},
        {"quantity": "٣"},
        {"quantity": "two"},
    ],
    ids=repr,
)
def test_wrong_order_is_refused_with_a_sentence(order_desk: Shop, changes: dict[str, str]) -> None:
    answer = order_desk.order(**changes)
    assert answer.status_code == 400
    assert '<p class="mistake" role="alert">Please ' in answer.text


def test_wrong_order_leaves_neither_order_nor_job(shop: Shop) -> None:
    shop.order(quantity="0")
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (0, 0)


def test_order_that_cannot_be_filled_is_rolled_back_with_its_job(shop: Shop) -> None:
    with databases.administration(shop.database_url) as cursor:
        cursor.execute("UPDATE shop_items SET stock = 5")
    assert [shop.order(quantity="3").status_code, shop.order(quantity="3").status_code] == [200, 409]
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (1, 1)
    assert shop.order(quantity="2").status_code == 200
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (2, 2)


def test_shop_lends_its_jobs_as_many_connections_as_run_at_a_time(shop: Shop) -> None:
    with processes.runner(shop.folder, shop.database_url, "--pool", "50") as runner:
        runner.terminate()
        assert runner.wait() == 0
        assert "WARNING" not in runner.output


def test_name_of_a_customer_is_shown_as_text_and_not_as_html(shop: Shop) -> None:
    shop.order(customer="<script>alert(1)</script>@example.com")
    assert "<script>" not in shop.page()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;@example.com" in shop.page()


def test_wrong_name_is_shown_again_as_text_and_not_as_html(shop: Shop) -> None:
    answer = shop.order(customer='"><script>alert(1)</script>')
    assert "<script>" not in answer.text
