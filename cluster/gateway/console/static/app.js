const session = await (await fetch("/console/session")).json();
document.getElementById("main").textContent = session.signed_in ? `Signed in as ${session.role}` : "Not signed in";
