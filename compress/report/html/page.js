"use strict";
// Draws the plots and lists the examples. All text goes into text nodes.
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const data = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function look() {
    const style = getComputedStyle(document.documentElement);
    const [ink, muted, line, low, high] = ["ink", "muted", "line", "ramp-low", "ramp-high"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const width = document.querySelector("main").clientWidth;
    const narrow = width < 600;
    const words = { labelColor: muted, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: null, font: getComputedStyle(document.body).fontFamily, view: { stroke: null },
      axis: { ...words, gridColor: line, domainColor: line, tickColor: line, labelLimit: 0.35 * width },
      legend: { ...words, columns: narrow ? 2 : undefined, labelLimit: 0.8 * width }, title: { color: ink }, text: { color: ink, fontSize: 12 }, rule: { color: muted },
      style: { "guide-title": { fill: ink, fontSize: 12, fontWeight: 500 } },
      range: { category: style.getPropertyValue("--series").split(",").map((colour) => colour.trim()), ramp: [low, high] },
    };
  }

  // One at a time, so that the page can be read and used meanwhile.
  async function draw() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      await new Promise((resolve) => setTimeout(resolve));
      await vegaEmbed(place, data.charts[place.dataset.chart], {
        actions: false, ast: true, config: look(), defaultStyle: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
      });
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  function node(tag, className, ...inside) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...inside);
    return element;
  }

  // Every second piece is marked.
  function text(pieces, tag) {
    if (pieces === null) return [node("p", "text missing", "no output")];
    const shown = node("p", "text");
    shown.dir = "auto";
    pieces.forEach((piece, number) => {
      const words = number % 2 ? piece.trimEnd() : "";
      if (words) shown.append(node(tag, "", words));
      shown.append(piece.slice(words.length));
    });
    const whole = pieces.join("");
    const lines = whole.split("\n").length;
    if (whole === "") shown.append(node("span", "missing", "empty"));
    if (lines <= 14 && whole.length <= 1200) return [shown];
    shown.classList.add("folded");
    const all = lines > 14 ? `all ${lines.toLocaleString("en")} lines` : `all ${whole.length.toLocaleString("en")} characters`;
    const button = node("button", "unfold", `Show ${all}`);
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const folded = shown.classList.toggle("folded");
      button.textContent = folded ? `Show ${all}` : "Show less";
      button.setAttribute("aria-expanded", String(!folded));
    });
    return [shown, button];
  }

  const number = (value) => (value === null ? "missing" : String(Number(value.toPrecision(4))));

  function card(example, output) {
    const [theirs, ours] = output.scores;
    const heading = node("h3", "", node("bdi", "", example.id));
    if (data.score) {
      const gain = gained(output);
      const mark = gain ? (gain > 0 ? " better" : " worse") : "";
      heading.append(node("span", `change${mark}`, `${data.score.name} ${number(theirs)} to ${number(ours)}`, mark ? node("span", "sign", mark) : ""));
    }
    if (output.changed !== null) heading.append(node("span", "change", output.changed ? `${(100 * output.changed).toFixed(0)} % of words differ` : "the same words"));
    const outputs = node(
      "div", "outputs",
      node("div", "", node("h4", "", "baseline"), ...text(output.baseline, "del")), node("div", "", node("h4", "", "candidate"), ...text(output.candidate, "ins")),
    );
    const sources = [["prompt", example.prompt], ...example.references.map((reference) => ["reference", reference])];
    const source = node("details", "", node("summary", "", "prompt and reference"), ...sources.map(([name, words]) => node("div", "source", node("h4", "", name), ...text([words]))));
    const whole = node("article", "example", heading);
    if (output.baseline !== null || output.candidate !== null) whole.append(outputs);
    whole.append(source);
    return whole;
  }

  // Of the candidate's score over the baseline's; null where one is missing.
  function gained(output) {
    const [theirs, ours] = output.scores;
    if (!data.score || theirs === null || ours === null) return null;
    return data.score.lower ? theirs - ours : ours - theirs;
  }

  function explore() {
    const [search, sort, candidate, list, more, count] = ["search", "sort", "candidate", "list", "more", "count"].map((id) => document.getElementById(id));
    if (!list) return;
    const STEP = 20;
    let room = STEP;
    const keys = { lost: (output) => { const gain = gained(output); return gain === null ? null : -gain; }, gained, changed: (output) => output.changed, order: () => 0 };
    const haystacks = data.examples.map((example) => [example.id, example.prompt, ...example.references].join("\n").toLowerCase());

    function show() {
      const which = candidate ? Number(candidate.value) : 0;
      const query = search.value.trim().toLowerCase();
      const within = (example, place, output) => haystacks[place].includes(query) || [output.baseline, output.candidate].some((pieces) => pieces && pieces.join("").toLowerCase().includes(query));
      const results = data.examples
        .map((example, place) => ({ example, place, output: example.outputs[which] }))
        .filter(({ example, place, output }) => output && (!query || within(example, place, output)))
        .map((row) => ({ ...row, key: keys[sort.value](row.output) }))
        .sort((a, b) => (a.key === null) - (b.key === null) || b.key - a.key || a.place - b.place);
      list.replaceChildren(...results.slice(0, room).map(({ example, output }) => card(example, output)));
      count.textContent = `${Math.min(room, results.length).toLocaleString("en")} of ${results.length.toLocaleString("en")} examples${query ? ` with “${search.value.trim()}”` : ""}`;
      more.hidden = results.length <= room;
    }

    for (const control of [search, sort, candidate]) control?.addEventListener("input", () => { room = STEP; show(); });
    search.form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => {
      const next = list.children.length;
      room += STEP;
      show();
      const first = list.children[next];
      first.tabIndex = -1;
      first.focus({ preventScroll: true });
    });
    if (!data.score) sort.value = "changed";
    show();
  }

  document.getElementById("save").addEventListener("click", () => {
    const { charts, ...numbers } = data;
    const link = node("a", "");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(numbers)], { type: "application/json" }));
    link.download = "report-numbers.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  // Names break behind their underscores, dots and slashes, where they must.
  for (const element of document.querySelectorAll("[data-name]")) {
    const pieces = element.firstChild?.textContent.split(/(?<=[_./])(?=\w)/) ?? [];
    if (pieces.length > 1) element.firstChild.replaceWith(...pieces.flatMap((piece, n) => (n ? [node("wbr", ""), piece] : [piece])));
  }

  explore();
  await draw();
  dark.addEventListener("change", draw);
})();
