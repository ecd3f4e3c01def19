// The trials of a search: another cost on the axis, and the details of the point that is looked at.
// Whatever comes from the run is set as text, never as markup.
(() => {
  const source = document.getElementById("trials");
  const figure = document.getElementById("front");
  if (!source || !figure) return;
  const data = JSON.parse(source.textContent);
  const panel = document.getElementById("point");
  const svg = figure.querySelector("figcaption ~ svg");
  const marks = [];
  for (const mark of svg.querySelectorAll("[data-point]")) marks[mark.dataset.point] = mark;
  const LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  let view = 0, current = null, pinned = false, spread = false;

  const make = (name, words, ...children) => {
    const element = document.createElement(name);
    if (words) element.textContent = words;
    element.append(...children);
    return element;
  };
  const number = (value, name = "") => {
    if (value == null) return "\u2013";
    if (name.endsWith("_ms")) return `${value.toFixed(value < 10 ? 2 : 1)} ms`;
    for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return `${(value / size).toPrecision(4)} ${unit}`;
    return String(Number(value.toPrecision(5)));
  };
  const percent = (value, of) => (value == null || !of ? "\u2013" : `${(100 * value / of).toFixed(1)} %`);

  const describe = (point) => {
    const [key, quality, costs, shares, blocks, choices, names, state, breaks] = data.points[point];
    const places = typeof choices === "string" ? [...choices].map((c) => LETTERS.indexOf(c)) : choices;
    const config = data.dims.map(([name, kind, offered], i) => [name, kind, offered[places[i]]]);
    const told = { front: "on the Pareto front", dropped: "dropped by the race: its quality is an estimate",
      failed: "failed: no finite value", random: "drawn at random, for comparison", trial: "" }[state];
    return { key, quality, costs, shares, blocks, names, config, breaks, told };
  };
  const byRole = (config) => {
    const roles = new Map();
    for (const [name, , choice] of config) {
      const role = name.replace(/^(.*?\.)?\d+\./, "");
      if (!roles.has(role)) roles.set(role, []);
      roles.get(role).push(choice);
    }
    return [...roles].map(([role, list]) => `${role}: ${list.join(" ")}`).join("\n");
  };
  const command = (found) => {
    const name = found.names.find((each) => data.scored.includes(each));
    if (name) return `${data.extract} ${name}`;
    const json = JSON.stringify(Object.fromEntries(found.config.map(([n, , c]) => [n, c])));
    return `${data.extract} '${json.replaceAll("'", "'\\''")}' --name ${found.key.replace(" ", "-")}`;
  };
  const copied = (text, style) => {
    const code = make("code", text);
    const block = make("pre", "", code);
    block.className = style;
    return [block, copyButton(code)];
  };
  const costTable = (found) => {
    const rows = [[`validation ${data.quality}`, number(found.quality), ""]];
    data.costs.forEach(([name, title], i) => {
      if (found.costs[i] != null)
        rows.push([title.replace(" (ms)", ""), number(found.costs[i], name), percent(found.costs[i], data.largest[i])]);
    });
    const head = make("tr", "", make("th"), make("th"), make("th", "of the largest"));
    const body = rows.map(([what, ...cells]) => {
      const first = make("th", what);
      first.scope = "row";
      return make("tr", "", first, ...cells.map((cell) => make("td", cell)));
    });
    return make("table", "", make("thead", "", head), make("tbody", "", ...body));
  };
  const kept = (found) => {
    const parts = data.kinds.map((kind, i) => [kind, found.shares[i], percent(found.shares[i], 1)]);
    if (data.blocks) parts.unshift(["blocks", found.blocks / data.blocks, `${found.blocks} of ${data.blocks}`]);
    const list = make("dl");
    for (const [kind, share, words] of parts) {
      const bar = make("span");
      bar.style.setProperty("--share", share ?? 0);
      list.append(make("dt", kind), make("dd", words, bar));
    }
    return list;
  };
  const loads = (found) => {
    const name = found.names.find((each) => data.loads[each]);
    if (!name) return [make("p", "Not extracted; this command writes it:"), ...copied(command(found), "wrap")];
    const [kind, code] = data.loads[name];
    const kinds = { peft: "a PEFT adapter", model: "a model of stock classes", "own-code": "a model with its own code" };
    const more = found.names.flatMap((each) => data.exports[each] ?? []);
    const told = more.length ? [make("p", `Exported, and loads with: ${more.join(", ")}.`)] : [];
    return [make("p", `Extracted as subnets/${name}, ${kinds[kind]}:`), ...copied(code, ""), ...told];
  };

  const show = (point) => {
    if (point === current || point == null) return;
    current = point;
    for (const old of document.querySelectorAll(".looked")) old.classList.remove("looked");
    const same = document.querySelectorAll(`[data-point="${point}"], [data-key="${data.points[point][0]}"]`);
    for (const mark of same) mark.classList.add("looked");
    const found = describe(point);
    const told = [found.told, ...found.breaks.map((name) => `misses the limit on ${name}`)].filter(Boolean);
    const all = make("details", "", make("summary", "All choices"), make("pre", byRole(found.config)));
    all.lastChild.className = "wrap";
    all.open = spread;
    all.addEventListener("toggle", () => { spread = all.open; });
    panel.replaceChildren(
      make("h3", [found.key[0].toUpperCase() + found.key.slice(1), ...found.names].join(" \u00b7 ")),
      make("p", told.length ? `${told.join("; ")}.` : "not on the front."),
      costTable(found),
      make("p", "Kept, as the mean part of the largest choice:"),
      kept(found), all, ...loads(found),
    );
  };
  const pin = (point) => {
    pinned = point != null && !(pinned && point === current);
    svg.classList.toggle("pinned", pinned);
    show(point);
  };

  const nearest = (event, reach) => {
    const scale = svg.getScreenCTM();
    let best = null, least = reach;
    data.views[view].x.forEach((x, i) => {
      if (x == null) return;
      const away = Math.hypot(x * scale.a + scale.e - event.clientX, data.y[i] * scale.d + scale.f - event.clientY);
      // Of points at the same place the one on top, which is drawn last.
      if (away <= least) [best, least] = [i, away];
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    if (!pinned && event.pointerType !== "touch") show(nearest(event, 18));
  });
  svg.addEventListener("click", (event) => pin(nearest(event, 28)));

  // One stop of the tab key for all points; arrows go from point to point, in the order of the cost.
  const inOrder = () => data.views[view].x.map((x, i) => [x, i]).filter(([x]) => x != null)
    .sort((a, b) => a[0] - b[0] || data.y[b[1]] - data.y[a[1]]).map(([, i]) => i);
  const focus = (point) => {
    for (const mark of marks) mark.tabIndex = -1;
    marks[point].tabIndex = 0;
    return marks[point];
  };
  svg.addEventListener("focusin", (event) => {
    const point = event.target.dataset.point;
    if (point != null && !pinned) show(Number(point));
  });
  svg.addEventListener("keydown", (event) => {
    const order = inOrder();
    const front = new Set(data.views[view].front);
    const path = ["ArrowLeft", "ArrowRight"].includes(event.key)
      ? order.filter((i) => front.has(i) || data.points[i][6].length) : order;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1 }[event.key];
    const here = Number(event.target.dataset.point);
    if (event.key === "Escape") pin(null);
    else if (event.key === "Enter" || event.key === " ") pin(here);
    else if (step) {
      const place = order.indexOf(here);
      const rest = step > 0 ? path.filter((i) => order.indexOf(i) > place)
        : path.filter((i) => order.indexOf(i) < place).reverse();
      if (rest.length) { pinned = false; svg.classList.remove("pinned"); focus(rest[0]).focus(); }
    } else return;
    event.preventDefault();
  });

  const draw = () => {
    const { name, x, front } = data.views[view];
    for (const layer of svg.querySelectorAll("[data-view]")) layer.classList.toggle("off", layer.dataset.view !== name);
    const members = new Set(front);
    marks.forEach((mark, i) => {
      mark.classList.toggle("off", x[i] == null);
      mark.setAttribute("transform", `translate(${x[i] ?? 0} ${data.y[i]})`);
      if (i !== data.best && ["trial", "front"].includes(data.points[i][7])) {
        mark.classList.toggle("front", members.has(i));
        mark.classList.toggle("trial", !members.has(i));
      }
    });
  };
  if (data.views.length > 1) {
    const choice = make("select");
    data.costs.forEach(([, title], i) => {
      const option = make("option", title.replace(" (ms)", ""));
      option.value = i;
      choice.append(option);
    });
    choice.addEventListener("change", () => { view = Number(choice.value); draw(); });
    figure.insertBefore(make("label", "Against ", choice), svg);
  }
  svg.setAttribute("role", "group");
  marks.forEach((mark, i) => {
    delete mark.dataset.tip;
    mark.setAttribute("role", "button");
    mark.setAttribute("aria-label", [data.points[i][0], ...data.points[i][6]].join(", "));
    mark.tabIndex = -1;
  });
  panel.hidden = false;
  const first = data.best ?? data.views[0].front[0] ?? marks.length - 1;
  focus(first);
  show(first);
  const hint = make("span", "Point at a trial to see it here; a click holds it. With keys: tab, then the arrows.");
  hint.className = "note";
  figure.querySelector("figcaption").append(hint);
})();

// Drawings of which one is shown at a time.
for (const group of document.querySelectorAll("figure[data-choose]")) {
  const drawings = [...group.querySelectorAll("[data-title]")];
  const choice = document.createElement("select");
  for (const drawing of drawings) choice.add(new Option(drawing.dataset.title));
  choice.setAttribute("aria-label", group.dataset.choose);
  choice.addEventListener("change", () => {
    drawings.forEach((drawing, i) => { drawing.hidden = i !== choice.selectedIndex; });
  });
  group.insertBefore(choice, drawings[0]);
}
