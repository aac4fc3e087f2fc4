// The pages behind the links in letters: they send what stands behind the # with the fields of the form.
"use strict";

const form = document.getElementById("form");
const answer = document.getElementById("answer");
const token = location.hash.slice(1);
// Neither the history of the browser nor a bookmark shall keep it.
history.replaceState(null, "", location.pathname);

if (!token) {
  form.hidden = true;
  answer.textContent = "This address is not whole: open the link in the letter again.";
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  answer.textContent = "";
  try {
    const body = { token, ...Object.fromEntries(new FormData(form)) };
    const response = await fetch(form.dataset.path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (response.ok) {
      form.hidden = true;
      answer.textContent = "Done.";
      return;
    }
    const problem = await response.json();
    const fields = (problem.errors || []).map((error) => `${error.field} ${error.message}`);
    answer.textContent = fields.length ? fields.join("; ") : problem.detail;
  } catch {
    answer.textContent = "The shop did not answer; try again.";
  }
  button.disabled = false;
});
