// Shows /openapi.json: operations by tag, with parameters, bodies and responses.

const METHODS = ["get", "put", "post", "patch", "delete"];

/** An element with text and children; text is never read as markup. */
function element(name, text = "", ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

/** A schema with its references resolved; one inside itself stays a name. */
function resolved(schema, spec, seen = []) {
  if (Array.isArray(schema)) return schema.map((item) => resolved(item, spec, seen));
  if (schema === null || typeof schema !== "object") return schema;
  if (typeof schema.$ref === "string") {
    const name = schema.$ref.split("/").pop();
    if (seen.includes(name)) return name;
    return resolved(spec.components.schemas[name], spec, [...seen, name]);
  }
  return Object.fromEntries(
    Object.entries(schema).map(([key, value]) => [key, resolved(value, spec, seen)]),
  );
}

function parameters(list, spec) {
  const rows = list.map((given) => {
    const schema = resolved(given.schema ?? {}, spec);
    const kind = schema.type ?? (schema.anyOf ?? []).map((one) => one.type).join(" or ");
    return element("tr", "", element("td", given.name), element("td", given.in),
      element("td", kind + (given.required ? ", required" : "")),
      element("td", given.description ?? ""));
  });
  const head = ["name", "in", "type", "meaning"].map((text) => element("th", text));
  return element("table", "", element("tr", "", ...head), ...rows);
}

function contents(title, content, spec) {
  return Object.entries(content ?? {}).flatMap(([kind, { schema }]) => [
    element("h3", `${title}: ${kind}`),
    element("pre", JSON.stringify(resolved(schema ?? {}, spec), null, 2)),
  ]);
}

function operation(method, path, given, spec) {
  const made = document.getElementById("operation").content.cloneNode(true);
  made.querySelector(".method").textContent = method.toUpperCase();
  made.querySelector(".path").textContent = path;
  made.querySelector(".title").textContent = given.summary ?? "";
  made.querySelector(".description").textContent = given.description ?? "";
  const parts = made.querySelector(".parts");
  made.querySelector("details").addEventListener("toggle", () => {
    if (parts.hasChildNodes()) return; // schemas are written out once they are looked at
    if (given.parameters) parts.append(element("h3", "parameters"), parameters(given.parameters, spec));
    parts.append(...contents("body", given.requestBody?.content, spec));
    for (const [status, response] of Object.entries(given.responses ?? {})) {
      parts.append(...contents(`response ${status}`, response.content, spec));
    }
  });
  return made;
}

async function show() {
  const main = document.getElementById("operations");
  const spec = await (await fetch("openapi.json")).json();
  document.getElementById("summary").textContent = `${spec.info.summary ?? ""} ${spec.info.version}`;
  const sections = new Map();
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const method of METHODS.filter((name) => name in item)) {
      const tag = item[method].tags?.[0] ?? "other";
      if (!sections.has(tag)) sections.set(tag, element("section", "", element("h2", tag)));
      sections.get(tag).append(operation(method, path, item[method], spec));
    }
  }
  main.replaceChildren(...sections.values());
}

show().catch((error) => {
  document.getElementById("operations").textContent = `openapi.json cannot be shown: ${error}`;
});
