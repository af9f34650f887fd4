// The page of `minisd serve`. A drawing is one request, answered by one line of JSON per step; to end the request is to
// stop the drawing. Texts from the server are only ever set as text.
"use strict";

const find = selector => document.querySelector(selector);
let running = null; // the AbortController of the request in progress
let result = null; // what the server said last of a finished picture
let chosen = null; // the number of the word whose map was asked for last

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const url = picture => `data:image/png;base64,${picture}`;

function view(picture, alt) {
  find("#view").replaceChildren(element("img", { src: url(picture), alt }));
}

const status = (...children) => find("#status").replaceChildren(...children);

const alert = message => status(element("div", { className: "error", role: "alert" }, message));

function finished(text = "") {
  const link = element("a", { download: result.name, href: url(result.picture) }, "Download PNG");
  const seconds = result.seconds.toFixed(1);
  const row = element("div", { className: "row" }, element("span", {}, `Seed ${result.seed}, drawn in ${seconds} s`), link);
  const notes = result.notes.map(note => element("div", { className: "note" }, note));
  status(row, ...(text ? [element("p", { className: "hint" }, text)] : []), ...notes);
}

function chips(words) {
  find("#words").hidden = !words.length;
  find("#words div").replaceChildren(...["picture", ...words].map((word, index) => element("label", {},
    element("input", { type: "radio", name: "word", value: index - 1, checked: !index, onchange: () => look(index - 1) }),
    element("span", {}, word))));
}

async function ask(place, values, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(place, { method: "POST", headers, body: JSON.stringify(values), signal });
  if (!response.ok) throw new Error(await response.text());
  return response;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part; !(part = await reader.read()).done;) {
    const whole = (rest + part.value).split("\n");
    rest = whole.pop();
    yield* whole.map(line => JSON.parse(line));
  }
}

async function draw() {
  running?.abort();
  const mine = running = new AbortController();
  const values = Object.fromEntries(new FormData(find("#form")));
  let last = null;
  find("#stop").disabled = false;
  status("Waiting for other pages …");
  try {
    for await (const event of lines(await ask("draw", values, mine.signal))) {
      if (running !== mine) return;
      if (event.error !== undefined) return alert(event.error);
      if (event.call) {
        if (!last) chips([]);
        last = event;
        view(event.picture, `${values.prompt}, unfinished`);
        status(element("progress", { value: event.call, max: event.calls }), `Step ${event.call} of ${event.calls}`);
      } else {
        result = event;
        view(result.picture, values.prompt);
        chips(result.words);
        return finished();
      }
    }
    throw new Error("the server ended the request");
  } catch (error) {
    if (running !== mine) return;
    if (!mine.signal.aborted) return alert(error.message);
    status(last ? `Stopped after step ${last.call} of ${last.calls}.` : "Stopped before the first step.");
  } finally {
    if (running === mine) find("#stop").disabled = true;
  }
}

async function look(word) {
  const { id, name, picture } = result;
  chosen = word;
  if (word < 0) {
    view(picture, name);
    return finished();
  }
  try {
    const shown = await (await ask("look", { id, word: String(word) })).json();
    if (chosen !== word || result.id !== id) return;
    view(shown.picture, `attention to the word: ${result.words[word]}`);
    finished(shown.text);
  } catch (error) {
    alert(error.message);
  }
}

find("#form").onsubmit = event => {
  event.preventDefault();
  draw();
};
find("#preset select").onchange = event => {
  const fields = JSON.parse(event.target.selectedOptions[0].dataset.fields);
  for (const [name, text] of Object.entries(fields)) {
    const field = find("#form").elements[name];
    if (field.options) {
      field.options[0].text = text;
      field.selectedIndex = 0;
    } else {
      field.value = text;
    }
  }
};
find("#stop").onclick = () => running?.abort();
for (const area of document.querySelectorAll("textarea")) {
  area.onkeydown = event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draw();
  };
}
