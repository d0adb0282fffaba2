"""The shop of examples/flask_shop: with the two commands that the README gives, as its Procfile and docker-compose.yml
have it, with its own tests, and with runners that are killed.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import pages
import processes
import pytest
import requests
import yaml
from waiting import eventually

SHOP = processes.ROOT / "examples" / "flask_shop"
ORDER = {"customer": "ann@example.com", "item": "Notebook", "quantity": "2"}


class Shop:
    """A shop that takes orders, in a folder of its own. `environment` is that of all its processes."""

    def __init__(self, folder: Path, database_url: str, environment: dict[str, str], address: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.environment = environment
        self.address = address

    def page(self) -> str:
        return requests.get(self.address, timeout=30).text

    def order(self, **changes: str) -> requests.Response:
        return requests.post(f"{self.address}/orders", {**ORDER, **changes}, timeout=30)

    def runner(self, *arguments: str, **more: str) -> contextlib.AbstractContextManager[processes.Process]:
        return processes.runner(self.folder, self.database_url, *arguments, environment={**self.environment, **more})

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command to its end; returns what it printed."""
        place = {"folder": self.folder, "database_url": self.database_url, "environment": self.environment}
        return processes.run(*command, status=status, **place)  # type: ignore[arg-type]

    def count(self, what: str) -> int:
        with databases.administration(self.database_url) as cursor:
            cursor.execute(f"SELECT count(*) FROM {what}")
            (count,) = cursor.fetchone() or (0,)
            return int(count)

    def wait_for(self, sql: str, *parameters: object) -> None:
        """Block until the statement, which asks for one truth, says so."""
        with databases.administration(self.database_url) as cursor:

            def is_so() -> bool:
                cursor.execute(sql, parameters or None)
                return cursor.fetchone() == (True,)

            eventually(is_so, f"{sql} {parameters}", seconds=processes.PATIENCE_SECONDS)

    def execute(self, sql: str) -> None:
        with databases.administration(self.database_url) as cursor:
            cursor.execute(sql)


def copied(folder: Path) -> Path:
    """A copy of the example, so that nothing is written in the checkout."""
    return shutil.copytree(SHOP, folder / "shop", ignore=shutil.ignore_patterns(".*", "__pycache__"))


@contextlib.contextmanager
def opened(folder: Path, database_url: str) -> Iterator[Shop]:
    """A shop in a copy of its own, served by `flask run`."""
    copy, port = copied(folder), processes.free_port()
    environment = {"FLASK_RUN_PORT": str(port)}
    with processes.start("flask", "run", folder=copy, database_url=database_url, environment=environment) as server:
        server.wait_for_line("Running on ")
        yield Shop(copy, database_url, environment, f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def mailbox() -> Iterator[tuple[processes.Process, int]]:
    """The mail server of the Procfile, on a port that is free; it prints what it gets."""
    port = processes.free_port()
    command = ("python", "-m", "aiosmtpd", "-n", "-l", f"127.0.0.1:{port}")
    with processes.start(*command, folder=processes.ROOT) as server:
        eventually(lambda: answers(port), "no mail server", seconds=processes.PATIENCE_SECONDS)
        yield server, port


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


@pytest.fixture
def shop(tmp_path: Path, empty_database_url: str) -> Iterator[Shop]:
    with opened(tmp_path, empty_database_url) as shop:
        yield shop


@pytest.fixture(scope="module")
def order_desk(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop that several tests share, none of which leaves anything behind."""
    with databases.fresh(server_url) as url, opened(tmp_path_factory.mktemp("desk"), url) as shop:
        yield shop


# --- two terminals ----------------------------------------------------------------------------------------------------


def test_order_posted_in_one_process_is_charged_by_the_other(shop: Shop) -> None:
    # It is not to warn of a machine that is busy with other things.
    with shop.runner("--pool", "50", "--max-blocking", "0") as runner:
        assert '<td class="waiting">waiting</td>' in shop.order().text
        runner.wait_for_line(r"^Mail to ann@example\.com: Your order 1: Thank you for ordering 2 × Notebook\.")
        shop.wait_for("SELECT count(*) = 0 FROM background_jobs")
        runner.terminate()
        assert runner.wait() == 0
        assert "WARNING" not in runner.output  # as of too few connections for so many jobs
    assert "paid at" in shop.page()
    assert "15.80 in the ledger" in shop.page()


def test_order_waits_for_a_runner_that_comes_later(shop: Shop) -> None:
    shop.order()
    shop.run("greenjobs", "run", "--until-empty")
    assert '<td class="waiting">waiting</td>' not in shop.page()


def test_order_beyond_the_limit_of_the_bank_is_declined_and_put_back(shop: Shop) -> None:
    shop.order(item="Coffee mug", quantity="100")
    printed = shop.run("greenjobs", "run", "--until-empty")
    assert "Your bank declined 1200.00. Nothing was charged." in printed
    assert '<td class="mistake">declined</td>' in shop.page()
    assert shop.count("shop_items WHERE name = 'Coffee mug' AND stock = 1000") == 1
    assert shop.count("shop_ledger") == 0


def test_wrong_order_leaves_neither_order_nor_job(shop: Shop) -> None:
    shop.order(quantity="0")
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (0, 0)


def test_order_that_cannot_be_filled_is_rolled_back_with_its_job(shop: Shop) -> None:
    shop.execute("UPDATE shop_items SET stock = 5")
    assert [shop.order(quantity="3").status_code, shop.order(quantity="3").status_code] == [200, 409]
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (1, 1)
    assert shop.order(quantity="2").status_code == 200
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"customer": ""},
        {"customer": "ann"},
        {"customer": "ann@example.com\r\nBcc: all@example.com"},
        {"customer": "a\0nn@example.com"},
        {"customer": f"{'a' * 200}@example.com"},
        {"customer": "Ann <ann@example.com>"},
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


def test_wrong_name_is_shown_again_as_text_and_not_as_html(order_desk: Shop) -> None:
    answer = order_desk.order(customer='"><script>alert(1)</script>')
    assert "<script>" not in answer.text
    assert "&lt;script&gt;" in answer.text


def test_provider_charges_once_for_each_key(order_desk: Shop) -> None:
    ask = {"url": f"{order_desk.address}/provider/charges", "timeout": 30}
    key = {"Idempotency-Key": "of this test"}
    receipts = [requests.post(data={"amount": "1.50"}, headers=key, **ask).json() for _ in range(2)]  # type: ignore[arg-type]
    assert receipts == [{"receipt": "receipt-of-of this test"}] * 2
    assert order_desk.count("provider_charges WHERE key = 'of this test' AND amount = 1.50 AND asked = 2") == 1
    order_desk.execute("DELETE FROM provider_charges")


@pytest.mark.parametrize(("key", "amount"), [("", "1"), ("a", ""), ("a", "-1"), ("a", "NaN"), ("a", "much")])
def test_provider_refuses_what_makes_no_sense(order_desk: Shop, key: str, amount: str) -> None:
    address, headers = f"{order_desk.address}/provider/charges", {"Idempotency-Key": key}
    assert requests.post(address, {"amount": amount}, headers=headers, timeout=30).status_code == 400


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_orders_are_charged_once_and_mailed_at_least_once_while_runners_are_killed(shop: Shop) -> None:
    """Without the constraint of the ledger, which would keep a second booking out, too."""
    shop.execute("ALTER TABLE shop_ledger DROP CONSTRAINT shop_ledger_order_id_key")
    orders = 40
    for number in range(orders):
        shop.order(customer=f"customer-{number}@example.com").raise_for_status()
    with mailbox() as (mails, port):
        where = {"SHOP_SMTP": f"127.0.0.1:{port}"}
        for least in (5, 10):
            with shop.runner("--pool", "8", **where) as runner:
                shop.wait_for("SELECT count(*) >= %s FROM shop_ledger", least)
                shop.wait_for("SELECT count(*) > 0 FROM background_jobs WHERE state = 'running'")
                runner.kill()
        with shop.runner("--pool", "50", **where):
            shop.wait_for("SELECT count(*) = 0 FROM background_jobs")
        assert shop.count("shop_ledger") == shop.count("(SELECT DISTINCT order_id FROM shop_ledger) AS paid") == orders
        assert shop.count("shop_orders WHERE paid_at IS NOT NULL") == orders
        assert shop.count("provider_charges") == orders
        for number in range(orders):
            mails.wait_for_line(rf"^To: customer-{number}@example\.com$")


def test_mail_waits_until_the_mail_server_is_back(shop: Shop) -> None:
    port = processes.free_port()
    with shop.runner("--pool", "50", SHOP_SMTP=f"127.0.0.1:{port}") as runner:
        shop.order()
        runner.wait_for_line(r"\(send_mail\) failed on attempt 1 of 11; retrying in 1\.0 s")
        command = ("python", "-m", "aiosmtpd", "-n", "-l", f"127.0.0.1:{port}")
        with processes.start(*command, folder=shop.folder) as mails:
            mails.wait_for_line("^Subject: Your order 1$")
            mails.wait_for_line(r"^Message-ID: <job-\d+@shop\.example\.com>$")


def test_charge_waits_until_the_provider_is_back(shop: Shop) -> None:
    shop.order()
    away = {"SHOP_PAYMENTS_URL": f"http://127.0.0.1:{processes.free_port()}"}
    with shop.runner(**away) as runner:
        runner.wait_for_line(r"\(charge\) failed on attempt 1 of 11; retrying in 1\.0 s")
    with shop.runner() as runner:
        runner.wait_for_line("Thank you for ordering")
    assert shop.count("provider_charges WHERE asked = 1") == 1


# --- its other files --------------------------------------------------------------------------------------------------


def test_page_beside_it_is_followed_as_it_stands(server_url: str, tmp_path: Path) -> None:
    """Its own tests are among the commands."""
    with databases.fresh(server_url) as url:
        printed = pages.follow("../examples/flask_shop/README.md", copied(tmp_path), url)
    (output,) = printed.values()
    assert "Mail to manager@example.com: Sales until" in output
    tests = (SHOP / "tests" / "test_shop.py").read_text(encoding="utf-8").count("\ndef test_")
    assert f"{tests} passed" in output


def test_its_own_tests_pass_where_orders_wait(shop: Shop) -> None:
    """As after trying it by hand: they have a database of their own, which is gone afterwards."""
    shop.order()
    assert " passed" in shop.run("python", "-m", "pytest", "-q")
    assert (shop.count("shop_orders"), shop.count("background_jobs")) == (1, 1)
    assert shop.count("pg_database WHERE datname = current_database() || '_test'") == 0


def test_commands_of_its_page_are_those_of_the_readme() -> None:
    page = pages.blocks("../examples/flask_shop/README.md")
    commands = next(block.text for block in page if block.language == "text").splitlines()
    readme = (processes.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"cd examples/flask_shop && {command}\n" in readme for command in commands)


def test_procfile_serves_runs_and_prints_mails(empty_database_url: str, tmp_path: Path) -> None:
    lines = (SHOP / "Procfile").read_text(encoding="utf-8").splitlines()
    commands = dict(line.split(": ", 1) for line in lines)
    assert set(commands) == {"web", "runner", "mailbox"}
    web, mail = processes.free_port(), processes.free_port()
    environment = {"PORT": str(web), "FLASK_RUN_PORT": str(web)}
    shell = {name: f"exec env {command.replace(':8025', f':{mail}')}" for name, command in commands.items()}
    serve(copied(tmp_path), empty_database_url, shell, dict.fromkeys(commands, environment), web)


def test_compose_file_serves_runs_and_prints_mails(empty_database_url: str, tmp_path: Path) -> None:
    """Its very commands and settings, with the hosts and ports of this machine."""
    services = compose()["services"]
    web, mail = processes.free_port(), processes.free_port()
    here = {
        "0.0.0.0:5000": f"127.0.0.1:{web}",
        "0.0.0.0:8025": f"127.0.0.1:{mail}",
        "//web:5000": f"//127.0.0.1:{web}",
        "mail:8025": f"127.0.0.1:{mail}",
        "postgresql://shop:shop@db:5432/shop": empty_database_url,
    }

    def moved(text: str) -> str:
        for there, place in here.items():
            text = text.replace(there, place)
        return text

    commands = {name: f"exec {moved(services[name]['command'])}" for name in ("web", "runner", "mail")}
    environments = {
        name: {key: moved(value) for key, value in services[name]["environment"].items()} for name in commands
    }
    serve(copied(tmp_path), empty_database_url, commands, environments, web)


def serve(
    folder: Path, database_url: str, commands: dict[str, str], environments: dict[str, dict[str, str]], port: int
) -> None:
    """Start these shell commands all at once, and see an order through to the mail; then stop them."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            process = processes.start(
                "sh", "-c", command, folder=folder, database_url=database_url, environment=environments[name]
            )
            started[name] = stack.enter_context(process)
        eventually(lambda: answers(port), "it does not listen", seconds=processes.PATIENCE_SECONDS)
        requests.post(f"http://127.0.0.1:{port}/orders", ORDER, timeout=30).raise_for_status()
        (mails,) = [process for name, process in started.items() if name.startswith("mail")]
        mails.wait_for_line("^Subject: Your order 1$")
        for name in ("web", "runner"):
            started[name].terminate()
            assert started[name].wait() == 0


def compose() -> dict[str, Any]:
    parsed = yaml.safe_load((SHOP / "docker-compose.yml").read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


def test_compose_file_is_whole() -> None:
    file = compose()
    services = file["services"]
    known = {
        "build",
        "command",
        "depends_on",
        "environment",
        "healthcheck",
        "image",
        "ports",
        "stop_grace_period",
        "volumes",
    }
    for service in services.values():
        assert set(service) <= known
        for needed, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"} and "healthcheck" in services[needed]
        if "build" in service:
            context = (SHOP / service["build"]["context"]).resolve()
            assert context == processes.ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
    volumes = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert volumes == set(file["volumes"])
    url = services["web"]["environment"]["GREENJOBS_DATABASE_URL"]
    account = services["db"]["environment"]
    assert url == f"postgresql://{account['POSTGRES_USER']}:{account['POSTGRES_PASSWORD']}@db:5432/shop"


def test_image_has_what_it_copies_and_starts_what_the_compose_file_starts() -> None:
    instructions = [line.split(maxsplit=1) for line in (SHOP / "Dockerfile").read_text(encoding="utf-8").splitlines()]
    allowed = {"#", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "CMD"}
    assert {line[0] for line in instructions if line} <= allowed
    for word, rest in (line for line in instructions if line and line[0] == "COPY"):
        assert word and all((processes.ROOT / source).exists() for source in rest.split()[:-1])
    (command,) = [rest for line in instructions if line and line[0] == "CMD" for rest in line[1:]]
    assert json.loads(command) == compose()["services"]["web"]["command"].split()
    assert any(".[flask,sqlalchemy]" in rest for line in instructions if line and line[0] == "RUN" for rest in line[1:])


def test_what_it_requires_for_production_is_what_is_tested() -> None:
    lines = (SHOP / "requirements.txt").read_text(encoding="utf-8").splitlines()
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(processes.ROOT / "setup.cfg", encoding="utf-8")
    tested = parser["options.extras_require"]["test"].split()
    assert {line for line in lines if not line.startswith("#")} <= set(tested)
