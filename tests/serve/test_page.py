"""The chat page in a headless Chromium, with a server whose answers are scripted."""

import json
import re
import shutil

import pytest
from chat_server import ANSWERS, chat_server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, loaded; a script error or a violation of the policy fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(15_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security" in m.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert not problems


def say(page, text):
    """Send a message and wait for the end of the answer."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".user .text").last).to_have_text(text)
    expect(page.locator(".answer").last.locator(".tools button").first).to_be_visible()
    return page.locator(".answer .text").last


def contents(request):
    """(role, content) of the messages of a request."""
    return [(m["role"], m["content"].strip()) for m in request["messages"]]


def test_conversation_is_kept(page, server):
    page.fill("#system", "Be brief.")
    expect(say(page, "hello")).to_have_text("base with seed 1 says hello")
    say(page, "again")
    assert contents(server.requests[1]) == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", "base with seed 1 says hello"),
        ("user", "again"),
    ]  # fmt: skip
    assert server.requests[1]["temperature"] == 0.8
    assert "top_k" not in server.requests[1]  # has no effect
    state = page.locator(".answer .state").last
    expect(state).to_have_text(re.compile(r"\d+ \(2 cached\) \+ 6 tokens .* seed 1"))
    page.fill("#input", "not sent yet")
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["hello", "again"])
    expect(page.locator(".answer .text").last).to_have_text("base with seed 1 says again")
    assert page.input_value("#input") == "not sent yet"
    assert page.input_value("#system") == "Be brief."


def test_stop(page, server):
    page.fill("#input", "long")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    page.fill("#input", "typed meanwhile")
    page.keyboard.press("Enter")  # is not sent, and not lost
    page.keyboard.press("Escape")
    expect(page.locator(".answer .state")).to_have_text("seed 1 · stopped")
    assert page.input_value("#input") == "typed meanwhile"
    for _ in range(100):
        if server.left:
            break
        page.wait_for_timeout(50)
    assert server.left[0] < 1000
    assert len(server.requests) == 1


def test_a_message_that_is_sent_before_the_models_are_known(page, server):
    """It is sent once they are, and only once."""
    waiting, is_open = [], []
    answer = lambda route: route.continue_() if is_open else waiting.append(route)
    page.route("**/v1/models", answer)
    page.reload()
    page.fill("#input", "hello")
    for _ in range(3):
        page.keyboard.press("Enter")
    assert page.input_value("#input") == "hello"
    for _ in range(100):
        if waiting:
            break
        page.wait_for_timeout(20)
    is_open.append(True)
    for route in waiting:
        route.continue_()
    expect(page.locator(".answer .text")).to_have_text("base with seed 1 says hello")
    page.wait_for_timeout(200)
    assert [contents(r) for r in server.requests] == [[("user", "hello")]]
    assert page.input_value("#input") == ""


def test_retry_edit_and_delete_keep_what_was_there(page, server):
    say(page, "first")
    say(page, "second")
    page.locator(".answer").last.get_by_text("Retry").click()
    expect(page.locator(".answer .text").last).to_have_text("base with seed 2 says second")
    assert contents(server.requests[2]) == contents(server.requests[1])
    expect(page.locator("#input")).to_be_focused()  # the button is gone
    versions = page.locator(".versions")
    expect(versions).to_contain_text("2/2")
    page.get_by_label("Previous version").click()
    expect(page.locator(".answer .text").last).to_have_text("base with seed 1 says second")

    expect(page.get_by_label("Previous version")).to_be_focused()
    page.locator(".user").first.get_by_text("Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("changed")
    page.keyboard.press("Enter")
    expect(page.locator(".user .text")).to_have_text(["changed"])
    expect(page.locator(".answer .text")).to_have_text(["base with seed 1 says changed"])
    assert contents(server.requests[3]) == [("user", "changed")]
    page.get_by_label("Previous version").click()
    expect(page.locator(".user .text")).to_have_text(["first", "second"])

    page.locator(".user").first.get_by_text("Delete").click()
    expect(page.locator(".user .text")).to_have_text(["second"])
    page.get_by_text("Undo").click()
    expect(page.locator(".user .text")).to_have_text(["first", "second"])
    page.locator("#input").focus()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_value("second")
    page.keyboard.press("Escape")
    page.locator(".user").last.get_by_text("Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "second"


def test_models_side_by_side(page, server):
    server.models = ["base", "poet"]
    page.reload()
    page.click("#models summary")
    page.get_by_label("poet").check()
    page.keyboard.press("Escape")
    say(page, "hello")
    expect(page.locator(".answer h2")).to_have_text(["base", "poet"])
    expect(page.locator(".answer .text")).to_have_text(
        ["base with seed 1 says hello", "poet with seed 1 says hello"]
    )
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    say(page, "more")  # each model continues its own answer
    told = {r["model"]: contents(r)[1][1] for r in server.requests[2:]}
    assert told == {name: f"{name} with seed 1 says hello" for name in ("base", "poet")}
    page.set_viewport_size({"width": 380, "height": 700})
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] < boxes[1]["y"]
    assert page.evaluate("document.documentElement.scrollWidth") == 380


def test_probabilities(page, server):
    page.click("#probabilities")
    say(page, "hello")
    assert server.requests[0]["logprobs"]
    assert server.requests[0]["top_logprobs"] == 5
    token = page.locator(".token", has_text="seed")
    expect(token).to_have_class("token p4")
    token.hover()
    expect(page.locator("#tip tr")).to_have_text(["seed␣60.0 %", "other30.0 %"])
    page.mouse.move(1, 1)
    expect(page.locator("#tip")).to_be_hidden()
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip .chosen")).to_have_text("with␣60.0 %")
    page.click("#probabilities")
    expect(page.locator(".token:visible")).to_have_count(0)
    expect(page.locator(".answer .text")).to_have_text("base with seed 1 says hello")


def test_text_of_a_model_is_never_markup(page):
    say(page, "attack")
    text = page.locator(".answer .text")
    expect(text).to_contain_text("<img src=x onerror=")
    expect(text).to_contain_text("<script>document.title='hacked'</script>")
    assert text.locator("img, script, iframe, svg").count() == 0
    links = text.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel])")
    safe = "noopener noreferrer"
    assert links == [
        ["https://example.org/x.png", safe], ["https://example.org/?a=%3Cb%3E", safe],
    ]  # fmt: skip
    assert "hacked" not in page.title()
    say(page, "<b>mine</b>")
    expect(page.locator(".user b, #sidebar b")).to_have_count(0)


def test_markdown(page):
    text = say(page, "markdown")
    expect(text.locator("h3")).to_have_text("Lists")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("em")).to_have_text("italic")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol ul li")).to_have_text("inner")
    expect(text.locator("blockquote")).to_have_text("quoted")
    expect(text.locator("pre code")).to_have_text("print('<b>')")
    text.locator(".code button").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')"
    page.locator(".answer .tools").get_by_text("Copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.replace(" ", "") == ANSWERS["markdown"].replace(" ", "")
    for hard in ("*" * 20000, "[" * 20000, "`a" * 10000, "> " * 5000, "- " * 5000, "_a" * 9000):
        took = page.evaluate(
            "async (text) => { const { markdown } = await import('./dom.js');"
            "const start = performance.now(); markdown(text); return performance.now() - start }",
            hard,
        )
        assert took < 1500, hard[:3]


def test_key(browser, server, page):
    server.key = "secret"
    page.reload()
    expect(page.locator("#key-text")).to_have_text("This server needs an API key.")
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-text")).to_have_text("The server does not accept this API key.")
    page.fill("#key-field", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    say(page, "hello")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    server.key = "changed"  # while the page is open
    page.fill("#input", "kept")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_visible()
    page.fill("#key-field", "changed")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text").last).to_have_text("base with seed 1 says kept")


def test_errors_in_plain_words(page, server):
    server.refusals = 1
    page.fill("#input", "busy")
    page.keyboard.press("Enter")
    expect(page.locator(".state")).to_contain_text("Trying again in 1 s")
    expect(page.locator(".answer .text")).to_have_text("base with seed 1 says busy")
    state = page.locator(".state").last
    say(page, "full")
    expect(state).to_contain_text("no longer fits into the model's context")
    assert "max_completion_tokens" not in server.requests[-1]  # tried again with what is left
    say(page, "broken")
    expect(state).to_have_text("The connection ended before the answer was complete.")
    expect(page.locator(".answer .text").last).to_have_text("base with")
    say(page, "failing")
    expect(state).to_have_text("The server stopped: out of luck")
    page.context.set_offline(True)
    say(page, "are you there")
    expect(state).to_contain_text("The server does not answer")
    assert contents(server.requests[-1])[-1][1].endswith("failing")
    expect(page.get_by_text("Try again").last).to_be_visible()


def test_a_server_with_another_model(page, server):
    say(page, "hello")
    server.models = ["new"]
    say(page, "again")
    expect(page.locator(".state").last).to_contain_text("there is no such model")
    expect(page.locator("#chosen")).to_have_text("new")
    page.get_by_text("Try again").last.click()
    expect(page.locator(".answer .text").last).to_have_text("new with seed 1 says again")


def test_conversations(page, server, tmp_path):
    say(page, "hello")
    page.click("#new")
    say(page, "other")
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["other", "hello"])
    titles.last.hover()
    page.get_by_label("Rename hello").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(titles.last).to_have_text("Renamed")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert len(json.loads(file.read_text())["conversations"]) == 2
    titles.last.hover()
    page.get_by_label("Delete Renamed").click()
    expect(titles).to_have_text(["other"])
    page.set_input_files("#file", file)
    expect(titles).to_have_text(["other", "Renamed"])
    titles.last.click()
    expect(page.locator(".user .text")).to_have_text(["hello"])
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(file)  # the same file again changes nothing
    expect(page.locator("#notice")).to_contain_text("2 conversations were imported")
    expect(titles).to_have_count(2)
    file.write_text('{"conversations": [{"title": 3}]}')
    page.set_input_files("#file", file)
    expect(page.locator("#notice")).to_contain_text("holds no exported conversations")


def test_unsent_text_is_kept_and_deleted_conversations_stay_deleted(page, server):
    page.keyboard.type("a thought")  # the field has the focus
    other = page.context.new_page()
    page.close()
    other.goto(server.url)
    expect(other.locator("#input")).to_have_value("a thought")
    other.fill("#input", "long")
    other.keyboard.press("Enter")
    expect(other.locator(".answer .text")).to_contain_text("word word")
    other.locator("#conversations .title").hover()
    other.get_by_label("Delete long").click()
    expect(other.locator("#conversations li")).to_have_count(0)
    expect(other.locator("#send")).to_have_text("Send")
    other.reload()
    expect(other.locator("#conversations li")).to_have_count(0)


def test_full_storage_drops_probabilities_first(page):
    page.evaluate(
        "() => { const tokens = Array.from({length: 9}, () => ['x'.repeat(230000), 0, []]);"
        "const answer = {text: 'old', seed: 1, finish: 'stop', tokens};"
        "for (const id of ['one', 'two']) localStorage.setItem('llama_jax.chat.' + id,"
        "JSON.stringify({id, title: id, system: '', models: [], updated: 1, pick: 0,"
        "next: [{id: 't' + id, user: 'hi', answers: {base: answer}, next: [], pick: 0}]})) }"
    )
    saved = page.evaluate(
        "async () => { const store = await import('./store.js');"
        "const conversation = store.newConversation('new', ['base']);"
        "conversation.system = 's'.repeat(1500000); return store.save(conversation) }"
    )
    assert saved
    assert page.evaluate("localStorage.getItem('llama_jax.chat.one').length") < 1000
    page.reload()
    page.locator("#conversations .title", has_text="one").click()
    expect(page.locator(".answer .text")).to_have_text("old")


def test_settings_and_theme(page, server):
    page.click("#open-settings")
    page.fill("#set-temperature", "9")
    page.fill("#set-seed", "41")
    page.fill("#set-top_k", "")
    page.keyboard.press("Tab")
    assert page.input_value("#set-temperature") == "2"  # the largest
    assert page.input_value("#set-top_k") == "0"
    say(page, "hello")
    assert (server.requests[0]["seed"], server.requests[0]["temperature"]) == (41, 2)
    page.click("#reset")
    assert page.input_value("#set-temperature") == "0.8"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate(background) != light
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    page.reload()
    assert page.evaluate(background) == dark
    for _ in range(40):  # every control is reached by Tab, and its focus is visible
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_on_a_phone(browser, server):
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(server.url)
    page.tap("#input")
    page.keyboard.type("two")
    page.keyboard.press("Enter")  # a new line: phones have no Shift+Enter
    page.keyboard.type("lines")
    page.tap("#send")
    expect(page.locator(".user .text")).to_have_text("two\nlines")
    expect(page.locator(".answer .text")).to_contain_text("says two")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#menu")
    page.tap("#conversations .title")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#open-settings")
    page.tap("#close-settings")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()


def test_with_our_server(browser, tmp_path):
    """Every setting is accepted, the security policy allows the page, and stop ends the request."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from api_tools import FakeEngine, Running, chat_tokenizer, model, wait_until

    from llama_jax.serve.request import QueueFull

    tokenizer = chat_tokenizer(tmp_path)
    engine = FakeEngine(tokenizer)
    engine.script = engine.says("the cat sat on the mat")
    models = [model(tokenizer, "base"), model(tokenizer, "poet", adapter="poet")]
    context = browser.new_context()
    with Running(engine, models, keys=["secret"]) as server:
        page = context.new_page()
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if "Security" in m.text else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.fill("#key-field", "secret")
        page.keyboard.press("Enter")
        page.click("#models summary")
        page.get_by_label("poet").check()
        page.click("#open-settings")
        for name in ("top_k", "min_p", "presence_penalty", "frequency_penalty"):
            page.fill(f"#set-{name}", "1")
        page.fill("#set-repetition_penalty", "1.2")
        page.click("#probabilities")
        expect(say(page, "the cat")).to_have_text("the cat sat on the mat")
        expect(page.locator(".answer .text")).to_have_count(2)
        expect(page.locator(".state.error")).to_have_count(0)
        expect(page.locator(".state").last).to_contain_text("(3 cached)")
        sampling = engine.requests[0].sampling
        assert (sampling.seed, sampling.sample.top_k, sampling.presence_penalty) == (1, 1, 1)
        assert sampling.sample.repetition_penalty == 1.2
        page.locator(".token").first.hover()
        expect(page.locator("#tip .chosen")).to_contain_text("77.9 %")

        engine.error = QueueFull(1.0)
        page.fill("#input", "more")
        page.keyboard.press("Enter")
        expect(page.locator(".state").last).to_contain_text("Trying again in 1 s")
        engine.script, engine.error = engine.holds, None
        wait_until(lambda: len(engine.live) == 2)
        page.keyboard.press("Escape")
        wait_until(lambda: not engine.live)
        expect(page.locator(".state").last).to_have_text("seed 1 · stopped")
        page.fill("#input", "the cat " * 400)
        page.click("#send")
        expect(page.locator(".state").last).to_contain_text("no longer fits")
        context.close()
    assert not problems
