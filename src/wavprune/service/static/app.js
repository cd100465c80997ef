// The page: what is uploaded, what is set, and what the service says of it.

import { draw } from "./charts.js";
import { follow, link, onToken, request, send } from "./api.js";
import { jobs } from "./jobs.js";
import { bytes, count, element, find, percent, replaceRows, show } from "./page.js";

const state = { about: null, model: null, layers: null, layer: null, curves: null, preview: null };
const AUTO = "auto";

const settings = () => ({
  basis: find("#bases input:checked")?.value ?? AUTO,
  sparsity: Number(find("#sparsity").value) / 100,
  scope: find("#scope input:checked").value,
});
// How images become inputs; (x - mean) / std of values from 0 to 1.
const PIXELS = {
  unit: { mean: [0], std: [1] },
  signed: { mean: [0.5], std: [0.5] },
  imagenet: { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] },
  bytes: { mean: [0], std: [1 / 255] },
};
const inputs = () => ({ image_size: Number(find("#image-size").value) || null, ...PIXELS[find("#pixels").value] });
const color = (basis) => (basis === AUTO ? 8 : state.layers.bases.indexOf(basis) % 8);

async function attempt(action) {
  try {
    show(null);
    return await action();
  } catch (error) {
    show(error.message);
    return undefined;
  }
}

// Models.

async function upload(file) {
  const suffix = file.name.slice(file.name.lastIndexOf(".")).toLowerCase();
  if (!state.about.kinds.includes(suffix)) {
    throw new Error(`“${file.name}” is of no kind that is taken; allowed: ${state.about.kinds.join(", ")}`);
  }
  if (file.size > state.about.upload_bytes) {
    throw new Error(`“${file.name}” has ${bytes(file.size)}; allowed: up to ${bytes(state.about.upload_bytes)}`);
  }
  const box = find("#uploading");
  box.hidden = false;
  const said = (share, text) => {
    if (share === null) box.firstElementChild.removeAttribute("value");
    else box.firstElementChild.value = share;
    box.lastElementChild.textContent = text;
  };
  try {
    said(0, `Sending ${file.name}`);
    const model = await send("/models", file, (share) => said(share, `Sending ${file.name}, ${percent(share, 0)}`));
    await listModels();
    const measured = await new Promise((resolve) => {
      follow(`/models/${model.id}/events`, (now) => {
        if (now === null) resolve(request(`/models/${model.id}`));
        else if (now.state === "waiting") said(now.share, `Measuring every layer in every basis`);
        else resolve(now);
      });
    });
    if (measured.state === "refused") {
      await request(`/models/${model.id}`, { method: "DELETE" });
      throw new Error(`“${file.name}” was refused: ${measured.error}`);
    }
    location.hash = `model=${model.id}`;
  } finally {
    box.hidden = true;
    await listModels();
  }
}

async function listModels() {
  const models = await request("/models");
  replaceRows(
    find("#models"),
    models.map((model) => {
      const choose = element("button", { type: "button" }, model.state === "ready" ? model.name : `${model.name} (${model.state})`);
      choose.title = model.error ?? model.name;
      choose.setAttribute("aria-current", String(model.id === state.model?.id));
      choose.onclick = () => { location.hash = `model=${model.id}`; };
      const row = element("li", { "data-key": model.id }, choose);
      if (model.state === "refused") {
        const remove = element("button", { type: "button", class: "quiet", "aria-label": `Remove ${model.name}` }, "Remove");
        remove.onclick = () => attempt(() => removeModel(model.id));
        row.append(remove);
      }
      return row;
    }),
  );
  return models;
}

async function removeModel(id) {
  await request(`/models/${id}`, { method: "DELETE" });
  if (location.hash === `#model=${id}`) location.hash = "";
  else await listModels();
  // What was pressed is gone.
  find("#file").focus();
}

async function openModel() {
  const id = new URLSearchParams(location.hash.slice(1)).get("model");
  jobs.stop();
  state.model = null;
  find("#model").hidden = true;
  try {
    if (id) await openOne(id);
  } finally {
    await listModels();
  }
}

async function openOne(id) {
  const model = await request(`/models/${encodeURIComponent(id)}`);
  if (model.state === "refused") throw new Error(`“${model.name}” was refused: ${model.error}`);
  if (model.state === "waiting") throw new Error(`“${model.name}” is still being measured; choose it again in a moment.`);
  [state.layers, state.curves] = await Promise.all([
    request(`/models/${id}/layers`),
    request(`/models/${id}/curves`),
  ]);
  state.model = model;
  state.layer = state.layers.layers.reduce((a, b) => (b.weights > a.weights && b.kernel.some((n) => n > 1) ? b : a)).name;
  showModel();
  jobs.start(model, inputs);
  await refresh();
}

function showModel() {
  const { model, layers } = state;
  find("#model").hidden = false;
  find("#name").textContent = model.name;
  find("#facts").textContent = `${layers.layers.length} convolutions with ${count(layers.weights)} weights, ${bytes(layers.bytes)} of tensors${model.cannot_run ? `. It can be pruned, not run: ${model.cannot_run}` : ""}`;
  find("#megabytes").value = +((layers.bytes / 12) / 1e6).toPrecision(2);
  find("#running").hidden = !model.runs;
  find("#inputs-text").textContent = model.inputs ? inputFiles(model) : "Choose inputs";
  const chosen = find("#bases input:checked")?.value;
  const names = [...layers.bases, AUTO];
  find("#bases").replaceChildren(
    find("#bases legend"),
    ...names.map((name) => {
      const input = element("input", { type: "radio", name: "basis", value: name });
      input.checked = name === (names.includes(chosen) ? chosen : AUTO);
      const label = name === AUTO ? "auto, layer by layer" : name;
      return element("label", {}, input, element("span", { class: `swatch c${color(name)}` }), label, element("output", {}));
    }),
  );
  find("#which").replaceChildren(
    element("option", { value: "" }, "the whole network"),
    ...layers.layers.map((layer) => element("option", { value: layer.name }, layer.name)),
  );
  find("#layers tbody").replaceChildren(
    ...layers.layers.map((layer) => {
      const name = element("button", { type: "button", title: layer.name }, layer.name);
      const row = element(
        "tr", {},
        element("td", {}, name),
        element("td", {}, layer.kernel.join("×")),
        element("td", { class: "number" }, count(layer.weights)),
        element("td", {}),
        ...[0, 1, 2].map(() => element("td", { class: "number" })),
      );
      row.onclick = () => chooseLayer(layer.name, true);
      return row;
    }),
  );
  const skipped = Object.entries(layers.skipped);
  find("#skipped").hidden = !skipped.length;
  find("#skipped summary").textContent = `${skipped.length} layers are left as they are`;
  find("#skipped ul").replaceChildren(...skipped.map(([name, reason]) => element("li", {}, `${name}: ${reason}`)));
}

// What would happen: one request at a time, and the last setting wins.

const pending = { busy: false, again: false };

async function refresh() {
  const { sparsity } = settings();
  find("#amount").textContent = percent(sparsity, 1);
  if (pending.busy) {
    pending.again = true;
    return;
  }
  pending.busy = true;
  try {
    do {
      pending.again = false;
      const model = state.model;
      if (!model) return;
      const preview = await request(`/models/${model.id}/preview`, { method: "POST", json: settings() });
      if (model === state.model) {
        state.preview = preview;
        showPreview();
      }
    } while (pending.again);
  } finally {
    pending.busy = false;
  }
}

function showPreview() {
  const { preview, layers } = state;
  const least = Object.entries(preview.errors).reduce((a, b) => (b[1] < a[1] ? b : a))[0];
  for (const label of find("#bases").querySelectorAll("label")) {
    const name = label.firstElementChild.value;
    label.lastElementChild.textContent = percent(preview.errors[name], 1);
    label.classList.toggle("least", name === least);
  }
  const totals = [
    ["Error of the weights", percent(preview.error, 2)],
    ["Kept values", count(preview.kept)],
    ["Pruned", percent(preview.sparsity, 1)],
    ["Compressed, about", `${bytes(preview.bytes)}`],
  ];
  find("#totals").replaceChildren(...totals.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  find("#totals").title = `The tensors have ${bytes(layers.bytes)}`;
  const rows = find("#layers tbody").rows;
  preview.layers.forEach((layer, i) => {
    const cells = rows[i].cells;
    cells[3].textContent = layer.best;
    cells[4].textContent = percent(layer.sparsity, 1);
    cells[5].textContent = percent(layer.error, 1);
    cells[6].textContent = count(layer.bytes);
  });
  find("#compress").disabled = preview.scope === "global" || settings().scope === "global";
  showCurves();
  showKernels();
}

const AS = { error: "error, %", ratio: "error, % of the identity’s" };

function shownErrors(errors, identity) {
  if (find("#as").value === "error") return errors.map((y) => 100 * y);
  // At no sparsity there is no error to compare.
  return errors.map((y, i) => (identity[i] > 1e-3 ? (100 * y) / identity[i] : NaN));
}

function showCurves() {
  const { curves, preview } = state;
  const { basis, sparsity } = settings();
  const layer = find("#which").value;
  const named = Object.entries(curves.bases);
  const { identity } = curves.bases;
  const series = (x, y) => named.map(([name, one]) => ({ name, color: color(name), chosen: name === basis, x: x(one), y: y(one) }));
  const now = layer ? preview.layers.find((one) => one.name === layer) : preview;
  const of = layer ? ` of ${layer}` : "";
  draw(find("#by-sparsity"), {
    title: `Error${of} against sparsity in ${named.length} bases; ${percent(now.error, 1)} at ${percent(now.sparsity, 1)}`,
    series: series(() => curves.sparsity.map((x) => 100 * x), (one) => shownErrors(one.errors, identity.errors)),
    xLabel: "pruned, %", yLabel: AS[find("#as").value], xFormat: String, range: [0, 100],
    line: 100 * (settings().scope === "layer" ? sparsity : now.sparsity),
  });
  const sizes = named.flatMap(([, one]) => one.sizes.filter((_, i) => one.size_errors[i] > 0.01));
  draw(find("#by-size"), {
    title: `Error${of} against size`,
    series: series((one) => one.sizes, (one) => one.size_errors.map((y) => 100 * y)),
    xLabel: "compressed", yLabel: "error, %", xFormat: bytes,
    range: [Math.max(1, Math.min(...sizes, now.bytes)), Math.max(...sizes, now.bytes)],
    dot: { x: now.bytes, y: 100 * now.error, color: color(basis) },
  });
}

async function showKernels() {
  const layer = state.preview.layers.find((one) => one.name === state.layer);
  const query = new URLSearchParams({ layer: layer.name, ...settings() });
  const source = link(`/models/${state.model.id}/kernels.svg?${query}`);
  for (const row of find("#layers tbody").rows) {
    const chosen = row.cells[0].textContent === layer.name;
    row.classList.toggle("chosen", chosen);
    row.cells[0].firstElementChild.setAttribute("aria-current", String(chosen));
  }
  find("#pictured").textContent = `${layer.name}, ${percent(layer.sparsity, 1)} pruned, error ${percent(layer.error, 1)}. Red is above 0, blue below; dots were pruned.`;
  const next = new Image();
  next.src = source;
  // What is shown stays until the next picture is there.
  await next.decode().catch(() => {});
  if (query.toString() !== new URLSearchParams({ layer: state.layer, ...settings() }).toString()) return;
  find("#kernels").src = source;
  find("#kernels").alt = `Kernels of ${layer.name} before and after pruning, and their coefficients`;
  find("#picture").href = source;
}

async function chooseLayer(name, curvesToo) {
  state.layer = name;
  if (curvesToo) {
    find("#which").value = name;
    await loadCurves();
  }
  showKernels();
}

async function loadCurves() {
  const layer = find("#which").value;
  const query = layer ? `?${new URLSearchParams({ layer })}` : "";
  state.curves = await request(`/models/${state.model.id}/curves${query}`);
  showCurves();
}

// What people do.

function acceptFiles(target, take) {
  const stop = (event) => {
    event.preventDefault();
    event.stopPropagation();
  };
  for (const name of ["dragenter", "dragover"]) {
    target.addEventListener(name, (event) => {
      stop(event);
      target.classList.add("over");
    });
  }
  target.addEventListener("dragleave", () => target.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    stop(event);
    target.classList.remove("over");
    attempt(() => take([...event.dataTransfer.files]));
  });
  target.querySelector("input").addEventListener("change", async (event) => {
    const files = [...event.target.files];
    if (files.length) await attempt(() => take(files));
    event.target.value = "";
  });
}

const inputFiles = (model) => `${model.inputs} ${model.inputs === 1 ? "file" : "files"} of inputs`;

async function uploadInputs(files) {
  let model = state.model;
  for (const [i, file] of files.entries()) {
    find("#inputs-text").textContent = `Sending ${i + 1} of ${files.length}`;
    model = await send(`/models/${state.model.id}/inputs`, file, () => {});
  }
  state.model.inputs = model.inputs;
  find("#inputs-text").textContent = inputFiles(model);
}

const start = (job) => attempt(() => jobs.add(job));

find("#sparsity").addEventListener("input", () => attempt(refresh));
find("#bases").addEventListener("change", () => attempt(refresh));
find("#scope").addEventListener("change", () => attempt(refresh));
find("#which").addEventListener("change", () => attempt(async () => {
  if (find("#which").value) state.layer = find("#which").value;
  await loadCurves();
  showKernels();
}));
find("#as").addEventListener("change", showCurves);
find("#prune").onclick = () => start({ kind: "prune", ...settings() });
find("#compress").onclick = () => start({ kind: "compress", ...settings() });
find("#calibrate").onclick = () => start({ kind: "calibrate", ...settings(), level: find("#level").value, ...inputs() });
find("#fit").addEventListener("submit", (event) => {
  event.preventDefault();
  const target = Math.round(Number(find("#megabytes").value) * 1e6);
  start({ kind: "compress", basis: AUTO, target_bytes: target });
});
find("#remove").onclick = () => attempt(() => removeModel(state.model.id));
find("#problem button").onclick = () => show(null);
window.addEventListener("hashchange", () => attempt(openModel));
window.addEventListener("resize", () => state.preview && state.model && showCurves());
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());

onToken(() => new Promise((resolve) => {
  const form = find("#login");
  form.hidden = false;
  form.querySelector("input").focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    attempt(async () => {
      await request("/session", { method: "POST", json: { token: form.querySelector("input").value } });
      form.hidden = true;
      resolve();
    });
  };
}));

attempt(async () => {
  state.about = await request("/about");
  find("#kinds").textContent = `${state.about.kinds.join(", ")}; a .zip holds a Hugging Face directory; up to ${bytes(state.about.upload_bytes)}`;
  find("#file").accept = state.about.kinds.join(",");
  find("#inputs").accept = state.about.inputs.join(",");
  acceptFiles(find("#drop"), (files) => upload(files[0]));
  acceptFiles(find("#drop-inputs"), uploadInputs);
  await openModel();
  document.documentElement.dataset.ready = "true";
});
