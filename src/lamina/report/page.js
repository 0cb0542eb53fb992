"use strict";
// Draws the attention map from the numbers in #attention. All text goes through textContent.
(() => {
  const holder = document.getElementById("attention");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const tokens = data.tokens, size = tokens.length;
  const layer = document.getElementById("layer"), head = document.getElementById("head");
  const canvas = document.getElementById("map"), readout = document.getElementById("readout");
  const twin = document.getElementById("twin"), about = document.getElementById("about-twin");
  const cells = data.layers.map((each) => Uint8Array.from(atob(each.weights), (c) => c.charCodeAt(0)));
  let query = size - 1, key = -1;

  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣") || "∅";
  // A weight is kept as the square root of it, in 255 steps: small weights stay apart.
  const root = (q, k) => {
    const grid = cells[layer.selectedIndex], heads = data.heads, area = size * size, at = q * size + k;
    if (head.value !== "mean") return grid[Number(head.value) * area + at] / 255;
    let sum = 0;
    for (let h = 0; h < heads; h++) sum += (grid[h * area + at] / 255) ** 2;
    return Math.sqrt(sum / heads);
  };

  const draw = () => {
    const scale = Math.max(1, Math.floor(1024 / size)), context = canvas.getContext("2d");
    canvas.width = canvas.height = scale * size;
    const style = getComputedStyle(document.documentElement), heat = style.getPropertyValue("--heat");
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let q = 0; q < size; q++) {
      for (let k = 0; k < size; k++) {
        const value = root(q, k);
        if (value > 0) {
          context.fillStyle = `rgba(${heat}, ${value})`;
          context.fillRect(k * scale, q * scale, scale, scale);
        } else if (data.causal && k > q && (q + k) % 2) {
          context.fillStyle = "rgba(128, 128, 128, 0.10)"; // hatched: may not be seen
          context.fillRect(k * scale, q * scale, scale, scale);
        }
      }
    }
    context.strokeStyle = style.getPropertyValue("--tint") ? `rgb(${style.getPropertyValue("--tint")})` : "red";
    context.lineWidth = Math.max(1, scale / 6);
    context.strokeRect(0.5, query * scale, canvas.width - 1, scale);
    if (key >= 0) context.strokeRect(key * scale, query * scale, scale, scale);
  };

  const tell = () => {
    const row = [...tokens.keys()].map((k) => [k, root(query, k) ** 2]).sort((a, b) => b[1] - a[1]).slice(0, 8);
    about.textContent = `Token ${query} “${visible(tokens[query])}” looks most at:`;
    twin.replaceChildren(...row.map(([k, value]) => {
      const line = document.createElement("tr"), place = document.createElement("td"), name = document.createElement("td");
      const share = document.createElement("td"), bar = document.createElement("td"), box = document.createElement("span");
      place.textContent = k;
      name.textContent = visible(tokens[k]);
      name.className = "what";
      share.textContent = value.toFixed(3);
      box.className = "bar";
      box.style.width = `${Math.round(value * 90)}px`;
      bar.className = "what";
      bar.append(box);
      line.append(place, name, share, bar);
      return line;
    }));
    readout.textContent = key < 0 ? "Point at a cell, or use the arrow keys." :
      `“${visible(tokens[query])}” (${query}) → “${visible(tokens[key])}” (${key}): ${(root(query, key) ** 2).toFixed(3)}`;
  };
  const show = () => { draw(); tell(); };

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (value, length) => Math.min(size - 1, Math.max(0, Math.floor((value / length) * size)));
    query = at(event.clientY - box.top, box.height);
    key = at(event.clientX - box.left, box.width);
    show();
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    query = Math.min(size - 1, Math.max(0, query + moves[event.key][0]));
    key = Math.min(size - 1, Math.max(0, key + moves[event.key][1]));
    show();
  });
  layer.addEventListener("change", show);
  head.addEventListener("change", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  show();
})();
