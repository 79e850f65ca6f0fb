"""Servers that fail, and every request is completed once all the same. The server here is a stand-in whose sample of
a request is a function of its seed, and which fails as it is told to."""

import collections
import contextlib
import http.server
import json
import re
import socket
import threading
import time

import pytest

from ssd import sampling
from ssd.decoding import Decoding
from ssd.engines import openai as engine
from ssd.engines import pool
from ssd.engines.opening import open_engine
from ssd.engines.request import requests_for
from ssd.records import Problem
from ssd.samples import stored

PROBLEMS = [Problem(f"p{i}", "made", f"What is {i}+{i}?", str(2 * i), "1") for i in range(20)]
DECODING = Decoding(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.5, max_tokens=4)
REQUESTS = requests_for(PROBLEMS, [[1, 2, 3]] * 20, DECODING, 6, seed=0)
END = 2  # the token that ends a completion of the lab's model
WHAT_WAS_ASKED = sorted((r.problem_id, r.sample_index, [r.seed % 7, END]) for r in REQUESTS)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    patience = {"MIN_BACKOFF_S": 0.05, "MAX_BACKOFF_S": 0.2, "LOST_AFTER_S": 1.5}
    for name, value in patience.items():
        monkeypatch.setattr(pool, name, value)
    monkeypatch.setattr(engine, "CONCURRENCY", 16)


class Server(http.server.ThreadingHTTPServer):
    """Answers as `vllm serve` does; `fails(number, seed)` is None or how the request of that number ends instead:
    with a status, a choice like that, a body of these bytes, "break" its connection, "hang" and all others with it,
    "die" likewise, "drip" a body that never ends, "never" answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model, fails=lambda number, seed: None, port=0, **card):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.fails, self.card = model, fails, card
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies, self.silent, self.closed, self.lock = [], False, False, threading.Lock()
        self.in_flight, self.most_in_flight, self.connections, self.elsewhere = 0, 0, [], ""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def kill(self):
        """As a machine that goes away: nothing listens, and every connection breaks."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed before
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_):
        """Nothing: a broken connection is what was asked for."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing: the requests are not of interest."""

    def do_GET(self):
        self.hang()
        card = {"id": self.server.model, "object": "model", "max_model_len": 512}
        self.reply(200, {"object": "list", "data": [card | self.server.card]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            number = len(self.server.bodies)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        time.sleep(0.005)
        self.hang()
        failure = self.server.fails(number, body["seed"])
        with self.server.lock:
            self.server.in_flight -= 1
        if failure == "break":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif failure == "die":
            self.close_connection = True
            threading.Thread(target=self.server.kill).start()
        elif failure == "hang":
            self.server.silent = True
            self.hang()
        elif isinstance(failure, int):
            self.reply(failure, {"error": {"message": "as it was told"}})
        elif isinstance(failure, bytes):
            self.reply(200, failure)
        elif failure in ("drip", "never"):
            self.dribble(failure == "drip")
        else:
            choice = {"token_ids": [body["seed"] % 7, END], "finish_reason": "stop", "text": ""}
            if body["max_tokens"] == 1:  # as asked to see what the server can do
                choice |= {"token_ids": [END]}
            choice["prompt_token_ids"] = body["prompt"]
            choice["logprobs"] = {"token_logprobs": [-0.5, -0.25], "top_logprobs": [{"a": -0.25}, {"b": -0.25}]}
            choice["logprobs"] = {name: each[: len(choice["token_ids"])] for name, each in choice["logprobs"].items()}
            reply_id = (failure or {}).get("id", self.headers["X-Request-Id"])
            self.reply(200, {"id": f"cmpl-{reply_id}", "choices": [choice | (failure or {})]})

    def dribble(self, drips):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not self.server.closed:
            if drips:
                self.wfile.write(b" ")
            time.sleep(0.05)

    def hang(self):
        while self.server.silent:
            time.sleep(0.05)

    def reply(self, status, content):
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.send_header("Content-Type", "application/json")
        self.send_header("Location", f"{self.server.elsewhere}/completions")
        self.send_header("Retry-After-Ms", "5")
        self.end_headers()
        self.wfile.write(encoded)


def at(number, failure):
    """What fails from the request of that number on."""
    return lambda current, seed: failure if current >= number else None


def completed(servers, model, requests=REQUESTS):
    loaded = open_engine("openai:" + ",".join(server.url for server in servers), model, requests)
    return sorted((sample.problem_id, sample.sample_index, sample.token_ids) for sample in loaded.generate(requests))


def test_refusals_errors_and_broken_connections_are_tried_again(lab_model):
    failures = {0: 429, 1: 500, 2: "break", 3: 503, 4: {"finish_reason": "abort"}}
    server = Server(lab_model, lambda number, seed: failures.get(number % 23) if number > 1 else None)
    assert completed([server], lab_model) == WHAT_WAS_ASKED


def changed(**values):
    """A whole reply in which this differs."""
    choice = {"token_ids": [3, END], "prompt_token_ids": [1, 2, 3], "finish_reason": "stop",
              "logprobs": {"token_logprobs": [-0.5, -0.25]}}  # fmt: skip
    return choice | values


BAD_REPLIES = {
    "half of a JSON": (b'{"choices": [{"token_ids": [1', "no JSON"),
    "no choices": (b'{"choices": []}', "has not one choice"),
    "null": (b"null", "no JSON object"),
    "a list": (b"[]", "no JSON object"),
    "HTML": (b"<html>502 Bad Gateway</html>", "no JSON"),
    "not UTF-8": (b"\xff\xfe{}", "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "ids as text": (changed(token_ids=["3", "2"]), "token id '3'"),
    "ids as floats": (changed(token_ids=[3.0, 2.0]), "token id '3.0'"),
    "an id that the model has not": (changed(token_ids=[99_999, END]), "token id '99999'"),
    "an id below 0": (changed(token_ids=[-1, END]), "token id '-1'"),
    "no tokens": (changed(token_ids=[]), "gives 0 tokens"),
    "more tokens than asked for": (changed(token_ids=[3] * 5000), "gives 5000 tokens, and was asked for 1 to 4"),
    "stop without an end": (changed(token_ids=[3, 5]), "says stop, and the last token, 5"),
    "cut off early": (changed(finish_reason="length"), "cuts completions off at 2 tokens, before max_tokens=4"),
    "no log-probabilities": (changed(logprobs={"token_logprobs": [None, None]}), "'None' as a log-probability"),
    "a log-probability that is no number": (changed(logprobs={"token_logprobs": [float("nan"), 0.0]}), "'nan'"),
    "fewer log-probabilities than tokens": (changed(logprobs={"token_logprobs": [-0.5]}), "not as many"),
    "another prompt's answer": (changed(prompt_token_ids=[1, 2]), "another prompt"),
    "another request's answer": (changed(id="another"), "answers request 'cmpl-another'"),
}


def test_a_bad_reply_is_asked_for_again_and_no_part_of_it_is_kept(lab_model):
    bad = [reply for reply, _ in BAD_REPLIES.values()]
    server = Server(lab_model, lambda number, seed: bad[number // 4] if number % 4 == 3 and number < 80 else None)
    assert completed([server], lab_model) == WHAT_WAS_ASKED


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_server_that_replies_badly_for_ever_is_named_with_what_it_does(lab_model, kind, monkeypatch):
    monkeypatch.setattr(pool, "MAX_BACKOFF_S", 0.01)
    reply, message = BAD_REPLIES[kind]
    server = Server(lab_model, at(2, reply))
    with pytest.raises(ValueError, match=rf"failed 8 times, last at {server.url} \(.*{message}.*see that server's log"):
        completed([server], lab_model, requests=REQUESTS[:3])


def test_a_server_that_replies_badly_once_while_it_is_checked_is_used(lab_model):
    server = Server(lab_model, lambda number, seed: b"<html>" if number == 1 else None)
    assert completed([server], lab_model) == WHAT_WAS_ASKED


@pytest.mark.parametrize("failure", [429, "never", "drip"])
@pytest.mark.parametrize("first", [1, 30])
def test_a_server_that_never_finishes_ends_the_run_at_the_deadline(lab_model, failure, first, monkeypatch):
    """From its first request on, or amid the work; what was finished before is given."""
    monkeypatch.setenv("SSD_DEADLINE_S", "2")
    server, began = Server(lab_model, at(first, failure)), time.monotonic()
    message = "does not answer" if first == 1 else "no sample has finished for 2 s at .*or set SSD_DEADLINE_S"
    with pytest.raises(ValueError, match=rf"{server.url}.*" if first == 1 else message) as raised:
        completed([server], lab_model)
    server.closed = True
    assert time.monotonic() - began < 10
    assert server.url in str(raised.value) and re.search(message, str(raised.value))


def test_a_request_that_one_server_never_answers_is_completed_by_another(lab_model, monkeypatch):
    monkeypatch.setenv("SSD_DEADLINE_S", "2")
    one, other = Server(lab_model, at(2, "never")), Server(lab_model)
    assert completed([one, other], lab_model) == WHAT_WAS_ASKED
    one.closed = True


def test_a_server_that_points_elsewhere_is_not_followed(lab_model):
    server, elsewhere = Server(lab_model, at(1, 307)), Server(lab_model)
    server.elsewhere = elsewhere.url
    with pytest.raises(ValueError, match=f"{server.url} refuses a request"):
        completed([server], lab_model)
    assert elsewhere.bodies == []


def test_a_deadline_that_is_none_is_refused(lab_model, monkeypatch):
    monkeypatch.setenv("SSD_DEADLINE_S", "soon")
    with pytest.raises(ValueError, match="SSD_DEADLINE_S='soon' is not a number of seconds above 0"):
        completed([Server(lab_model)], lab_model)


@pytest.mark.parametrize("failure", ["die", "hang"])
def test_of_two_servers_one_may_go_away_for_good(lab_model, failure, monkeypatch):
    """Its connections break, or, as where a machine is switched off, it says nothing more."""
    monkeypatch.setattr(pool, "PROBE_S", 0.3)
    monkeypatch.setattr(pool, "PROBE_TIMEOUT_S", 0.5)
    one, other = Server(lab_model, at(20, failure)), Server(lab_model)
    assert completed([one, other], lab_model) == WHAT_WAS_ASKED
    assert len(one.bodies) < len(other.bodies)


def test_a_server_that_comes_back_is_used_again(lab_model):
    server, started = Server(lab_model, at(20, "die")), []
    start = threading.Timer(1.0, lambda: started.append(Server(lab_model, port=server.server_port)))
    start.start()
    assert completed([server], lab_model) == WHAT_WAS_ASKED
    assert len(server.bodies) < len(REQUESTS) and started[0].bodies


def test_when_every_server_is_lost_what_is_finished_stays_and_another_server_goes_on(lab_model, tmp_path):
    lost = ",".join(Server(lab_model, at(30, "die")).url for _ in range(2))
    with pytest.raises(ValueError, match=r"none of http://.* has answered for 1.5 s .*give the same command"):
        pending = sampling.pending(tmp_path, REQUESTS, {})
        sampling.sample(open_engine(f"openai:{lost}", lab_model, REQUESTS), pending, tmp_path)
    kept = len(stored(tmp_path))
    assert 20 <= kept < len(REQUESTS)
    rest = sampling.pending(tmp_path, REQUESTS, {})
    assert len(rest) == len(REQUESTS) - kept
    sampling.sample(open_engine(f"openai:{Server(lab_model).url}", lab_model, REQUESTS), rest, tmp_path)
    found = [(sample.problem_id, sample.sample_index, sample.token_ids) for sample in stored(tmp_path)]
    assert found == WHAT_WAS_ASKED


def test_a_request_that_fails_everywhere_ends_the_run_by_name(lab_model):
    poison = next(r for r in REQUESTS if (r.problem_id, r.sample_index) == ("p7", 3))
    servers = [Server(lab_model, lambda number, seed: 500 if seed == poison.seed else None) for _ in range(2)]
    with pytest.raises(ValueError, match=r"problem p7, sample 3 failed 8 times, .*see that server's log"):
        completed(servers, lab_model)


def test_a_server_has_a_bounded_number_of_requests(lab_model, monkeypatch):
    monkeypatch.setattr(engine, "CONCURRENCY", 3)
    slowly = lambda number, seed: time.sleep(0.1)  # noqa: E731  so that requests meet, however busy the machine is
    servers = [Server(lab_model, slowly), Server(lab_model, slowly)]
    assert completed(servers, lab_model) == WHAT_WAS_ASKED
    assert min(server.most_in_flight for server in servers) >= 1
    assert max(server.most_in_flight for server in servers) == 3


def test_few_requests_are_shared_out_evenly(lab_model):
    servers = [Server(lab_model), Server(lab_model)]
    completed(servers, lab_model, requests=REQUESTS[:20])
    counts = [len(server.bodies) - 1 for server in servers]  # one asks what the server can do
    assert sum(counts) == 20 and min(counts) >= 5


def test_every_setting_is_given_so_that_the_model_s_own_defaults_do_nothing(lab_model):
    server = Server(lab_model)
    completed([server], lab_model)
    asked = collections.Counter(json.dumps(body | {"seed": 0}, sort_keys=True) for body in server.bodies[1:])
    assert [json.loads(body) for body in asked] == [
        {
            "model": lab_model, "prompt": [1, 2, 3], "seed": 0, "max_tokens": 4, "temperature": 0.7, "top_k": 5,
            "top_p": 0.9, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
            "logprobs": 0, "return_token_ids": True, "stop": None,
        }
    ]  # fmt: skip
    assert {body["seed"] for body in server.bodies} == {request.seed for request in REQUESTS}


@pytest.mark.parametrize(
    ("card", "failure", "message"),
    [
        ({"id": "another/model"}, None, "serves another/model, not .*--served-model-name [0-9a-f]{32}"),
        ({"max_model_len": 6}, None, "has room for 6 tokens, and the longest request needs 7"),
        ({}, {"token_ids": None}, "returns no token ids"),
        ({}, {"finish_reason": "length"}, "cuts completions off at 2 tokens, before max_tokens=4"),
        ({}, 400, "refuses a request: .*as it was told"),
    ],
    ids=str,
)
def test_a_server_that_cannot_do_what_is_asked_is_refused(lab_model, card, failure, message):
    with pytest.raises(ValueError, match=message):
        completed([Server(lab_model, lambda number, seed: failure, **card)], lab_model)


def test_a_server_that_does_not_truncate_before_it_tempers_is_refused(lab_model):
    requests = requests_for(PROBLEMS, [[1, 2, 3]] * 20, Decoding(top_p=0.9, temperature_last=True, max_tokens=4), 1, 0)
    with pytest.raises(ValueError, match="does not truncate before it tempers .*--logits-processors"):
        completed([Server(lab_model)], lab_model, requests=requests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai", "engine=openai: does not name its servers"),
        ("openai:banana", "engine=openai:banana does not name its servers"),
        ("openai:http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 does not answer .*start it, or leave it out"),
        ("replay", "has no manifest.json; give a samples folder"),
        ("transformers:2", "engine=transformers:2 names a place"),
    ],
)
def test_a_place_that_is_none_is_refused(lab_model, name, message):
    with pytest.raises(ValueError, match=message):
        open_engine(name, lab_model, REQUESTS)
